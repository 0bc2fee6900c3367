// gelu?(x values * scales + bias) with x [M, K] bfloat16 quantised row by row and values [K, N] int8, on CPUs with
// AVX512-VNNI. Knows plain memory and, at the end, the C interface of programs that AOTInductor compiles; no model.
//
// A row of x becomes int8 by its own scale, largest magnitude / 127; the product is exact in int32; scales, bias and
// GELU are fp32, and the result is rounded to bfloat16 once. No sum depends on blocks or threads, so no result does.
//
// VPDPBUSD multiplies 16 lanes of 4 neighbours along K, unsigned times signed. Weights are the unsigned ones, shifted
// by 128; what that adds is 128 * (sum of the row of quantised x), and is taken off again. They are packed strip by
// strip of 64 columns as [K / 4][64][4], by the first tile that reads them: few rows pay for no second pass.
// Work items are (strip, block of rows) in that order, and each thread takes one contiguous range of them.
//
// Scratch, freed at the end: quantised x, M * (K + 8) bytes, and per thread one strip, 64 * K bytes.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "quantise.h"
#include "registers.h"

namespace {

constexpr int COLUMNS = 4;            // registers of a strip
constexpr int64_t STRIP = COLUMNS * LANES;
constexpr int TILE = 6;               // rows of a tile: with 4 registers of weights, 24 of the 32 registers are sums
constexpr int64_t ROWS = 16 * TILE;   // of a block: enough to pay for packing a strip once for each thread
constexpr int64_t DEPTH = 4;          // neighbours along K of a lane
constexpr int64_t MOST_INPUTS = 1 << 16;    // K for which 255 * 127 * K fits into int32
constexpr int64_t AHEAD = 64;         // rows of values fetched before they are read: strides defeat the processor's own
constexpr float LOG2_E = 1.44269504f;

struct Problem {
    const uint16_t* x;  // [M, K] bfloat16
    int64_t x_stride;
    const int8_t* values;          // [K, N]
    const uint16_t *scale, *bias;  // [N] bfloat16
    uint16_t* out;                 // [M, N] bfloat16
    int64_t M, K, N;
    bool gelu;
    int8_t* quantised;   // [M, K]
    float* row_scale;    // [M]
    int32_t* row_shift;  // [M], what shifted weights add to the row's sums
};

// 2^t within 4e-6 of itself. VSCALEFPS multiplies by 2^floor(t).
inline __m512 exp2(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, 0x09);  // t - floor(t)
    __m512 p = _mm512_set1_ps(0.0134262436f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0522431936f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241279870f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693044893f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, t);
}

// The tanh form within 2^-13 of itself: x / (1 + e^-2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline __m512 gelu(__m512 x) {
    constexpr float LINEAR = -2 * 0.797884561f * LOG2_E, CUBIC = LINEAR * 0.044715f;
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 t = _mm512_mul_ps(x, _mm512_fmadd_ps(square, _mm512_set1_ps(CUBIC), _mm512_set1_ps(LINEAR)));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(exp2(t), _mm512_set1_ps(1.0f))));
}

void quantise_row(const Problem& p, int64_t row) {
    const uint16_t* x = p.x + row * p.x_stride;
    const float most = std::max(largest(x, p.K), SMALLEST);  // of what is no number: that
    p.row_scale[row] = most / 127.0f;
    p.row_shift[row] = 128 * quantise(x, p.K, most, p.quantised + row * p.K);
}

// 4 rows of 64 weights -> 16 lanes of 4 neighbours along K in each of 4 registers. Columns come out in an order of
// their own, 4 by 4: register j holds 4 j .. 4 j + 3 of every 16. `in_order` turns sums back.
inline void interleave(const int8_t* values, int64_t stride, __mmask64 inside, __m512i (&out)[COLUMNS]) {
    __m512i row[DEPTH];
    UNROLL for (int i = 0; i < DEPTH; ++i)
        row[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, values + i * stride), _mm512_set1_epi8(-128));
    const __m512i low = _mm512_unpacklo_epi8(row[0], row[1]), high = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i low2 = _mm512_unpacklo_epi8(row[2], row[3]), high2 = _mm512_unpackhi_epi8(row[2], row[3]);
    out[0] = _mm512_unpacklo_epi16(low, low2);
    out[1] = _mm512_unpackhi_epi16(low, low2);
    out[2] = _mm512_unpacklo_epi16(high, high2);
    out[3] = _mm512_unpackhi_epi16(high, high2);
}

// Lane group j of register i <-> lane group i of register j: its own inverse.
inline void in_order(__m512i (&r)[COLUMNS]) {
    const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x44), b = _mm512_shuffle_i32x4(r[0], r[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(r[2], r[3], 0x44), d = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
    r[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// Sums of a tile [height, STRIP] -> results.
template <bool GELU>
void finish(const Problem& p, int64_t row, int64_t column, int64_t height, const int32_t* sums) {
    const int64_t width = std::min(STRIP, p.N - column);
    for (const int64_t end = row + height; row < end; ++row, sums += STRIP) {
        __m512i of_row[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; ++j) of_row[j] = _mm512_load_si512(sums + j * LANES);
        in_order(of_row);
        const __m512i shift = _mm512_set1_epi32(p.row_shift[row]);
        const __m512 row_scale = _mm512_set1_ps(p.row_scale[row]);
        uint16_t* out = p.out + row * p.N + column;
        UNROLL for (int j = 0; j < COLUMNS; ++j) {
            if (j * LANES >= width) break;
            const auto load = [&](const uint16_t* from) {
                return widen(_mm256_loadu_si256((const __m256i*)(from + column + j * LANES)));
            };
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(of_row[j], shift)), row_scale);
            y = _mm512_fmadd_ps(y, load(p.scale), load(p.bias));
            _mm256_storeu_si256((__m256i*)(out + j * LANES), narrow(GELU ? gelu(y) : y));
        }
    }
}

// HEIGHT rows times a strip of weights. FIRST reads the weights as they are given and leaves them packed.
template <int HEIGHT, bool FIRST>
void tile(const Problem& p, int64_t row, int64_t column, uint8_t* packed) {
    const int64_t K = p.K, N = p.N;
    const int8_t *x = p.quantised + row * K, *values = p.values + column;
    const __mmask64 inside = N - column >= STRIP ? ~0ull : (1ull << (N - column)) - 1;
    __m512i acc[HEIGHT][COLUMNS];
    UNROLL for (auto& sums : acc)
        UNROLL for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < K; k += DEPTH, packed += DEPTH * STRIP) {
        __m512i weights[COLUMNS];
        if constexpr (FIRST) {
            UNROLL for (int i = 0; i < DEPTH; ++i)
                _mm_prefetch((const char*)(values + std::min(k + i + AHEAD, K - 1) * N), _MM_HINT_T0);
            interleave(values + k * N, N, inside, weights);
            UNROLL for (int j = 0; j < COLUMNS; ++j) _mm512_store_si512(packed + j * 64, weights[j]);
        } else {
            UNROLL for (int j = 0; j < COLUMNS; ++j) weights[j] = _mm512_load_si512(packed + j * 64);
        }
        UNROLL for (int i = 0; i < HEIGHT; ++i) {
            int32_t neighbours;
            std::memcpy(&neighbours, x + i * K + k, sizeof neighbours);
            const __m512i row_values = _mm512_set1_epi32(neighbours);
            UNROLL for (int j = 0; j < COLUMNS; ++j)
                acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weights[j], row_values);
        }
    }
    alignas(64) int32_t sums[HEIGHT * STRIP];  // through memory: what follows would take registers from the loop
    UNROLL for (int i = 0; i < HEIGHT; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) _mm512_store_si512(sums + i * STRIP + j * LANES, acc[i][j]);
    (p.gelu ? finish<true> : finish<false>)(p, row, column, HEIGHT, sums);
}

// Work items [from, to): strip-major, so that a strip is packed once.
void multiply(const Problem& p, int64_t from, int64_t to, uint8_t* packed) {
    const int64_t blocks = (p.M + ROWS - 1) / ROWS;
    for (int64_t item = from; item < to; ++item) {
        const int64_t column = item / blocks * STRIP, start = item % blocks * ROWS, end = std::min(p.M, start + ROWS);
        bool first = item == from || start == 0;
        for (int64_t row = start; row < end; row += TILE, first = false)
            with_constant<TILE>(end - row, [&](auto height) {
                if (first)
                    tile<decltype(height)::value, true>(p, row, column, packed);
                else
                    tile<decltype(height)::value, false>(p, row, column, packed);
            });
    }
}

}  // namespace

enum Status : int32_t { OK, UNSUPPORTED_SIZE, NO_MEMORY };

// x has rows of K contiguous elements, `x_stride` elements apart; all else is contiguous.
extern "C" __attribute__((visibility("default"))) int32_t fastvar_linear_int8(
    const void* x, int64_t x_stride, const void* values, const void* scale, const void* bias, void* out, int64_t M,
    int64_t K, int64_t N, int32_t gelu, int32_t threads) {
    if (K <= 0 || K % DEPTH || K > MOST_INPUTS || N <= 0 || N % LANES) return UNSUPPORTED_SIZE;
    if (M <= 0) return OK;
    if (M * K * N < WORTH_THREADS) threads = 1;
    const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t strip = STRIP * K, rows = rounded(M * sizeof(float));
    char* memory = static_cast<char*>(std::aligned_alloc(64, threads * strip + 2 * rows + rounded(M * K)));
    if (!memory) return NO_MEMORY;
    char* of_rows = memory + threads * strip;
    const Problem p{static_cast<const uint16_t*>(x), x_stride, static_cast<const int8_t*>(values),
                    static_cast<const uint16_t*>(scale), static_cast<const uint16_t*>(bias),
                    static_cast<uint16_t*>(out), M, K, N, gelu != 0, reinterpret_cast<int8_t*>(of_rows + 2 * rows),
                    reinterpret_cast<float*>(of_rows), reinterpret_cast<int32_t*>(of_rows + rows)};
    const int64_t items = (N + STRIP - 1) / STRIP * ((M + ROWS - 1) / ROWS);
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
#pragma omp for
        for (int64_t row = 0; row < M; ++row) quantise_row(p, row);
        multiply(p, items * thread / count, items * (thread + 1) / count,
                 reinterpret_cast<uint8_t*>(memory + thread * strip));
    }
    std::free(memory);
    return OK;
}

// What a compiled program calls for fastvar::linear_int8; the op's fake implementation has checked shapes and types.
extern "C" AOTITorchError aoti_torch_cpu_linear_int8(AtenTensorHandle x, AtenTensorHandle values,
                                                     AtenTensorHandle scale, AtenTensorHandle bias, int32_t gelu,
                                                     AtenTensorHandle* out) {
    const AtenTensorHandle inputs[4] = {x, values, scale, bias};
    void *data[4], *result;
    int64_t *x_sizes, *x_strides, *sizes;
    bool ok = !aoti_torch_get_sizes(x, &x_sizes) && !aoti_torch_get_strides(x, &x_strides) &&
              !aoti_torch_get_sizes(values, &sizes);
    for (int i = 0; i < 4; ++i) ok = ok && !aoti_torch_get_data_ptr(inputs[i], &data[i]);
    if (!ok) return AOTI_TORCH_FAILURE;
    const int64_t M = x_sizes[0], K = sizes[0], N = sizes[1], out_sizes[2] = {M, N}, out_strides[2] = {N, 1};
    if (aoti_torch_empty_strided(2, out_sizes, out_strides, aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(),
                                 0, out) ||
        aoti_torch_get_data_ptr(*out, &result))
        return AOTI_TORCH_FAILURE;
    const int32_t status = fastvar_linear_int8(data[0], x_strides[0], data[1], data[2], data[3], result, M, K, N, gelu,
                                               omp_get_max_threads());
    return status == OK ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
