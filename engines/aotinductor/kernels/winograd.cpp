// 3x3 convolutions of stride 1 by Winograd's method, channels last, on CPUs with AVX512-VNNI: a quarter of the
// multiplications. Knows plain memory and, at the end, the C interface of programs that AOTInductor compiles; no model.
//
// After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): patches of 6x6 pixels, 4 apart, and
// the kernel are evaluated at 6x6 points; 36 products of matrices [patches, C] [C, O] give what tiles of 4x4 results
// are interpolated from, where a plain convolution takes 144. A 2x2 kernel gives tiles of 5x5 by the same points.
//
// `enlarges`: the convolution reads x enlarged by two, every pixel four times. Each of the four pixels that a pixel
// becomes sees at most two distinct rows and columns: four 2x2 convolutions of x, as 4 * O columns of one product.
//
// Transforms are fp32. In fp32 the products are too. In bfloat16 they are of 16-bit integers, exact in int32: a patch
// has a scale for each point and a column of weights too, by their norms over the channels, so that no sum leaves int32
// (Cauchy and Schwarz). That is as fast as products of bfloat16 and 4 to 8 times finer, which the points' large factors
// need. Magnitudes between 1e-15 and 1e15 are safe.
//
// Work items are blocks of patches; each thread takes one contiguous range of them. No result depends on blocks or
// threads: a patch's sums run over the channels in one order.
//
// Scratch, freed at the end: transformed weights, 36 * C * columns elements, and per thread one block (`Scratch`).

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "registers.h"
#include "winograd_points.h"
#include "winograd_weights.h"

namespace {

constexpr int ROWS = 6;               // patches of a product's tile: with 4 registers of weights, 24 of 32 are sums
constexpr int64_t BLOCK_BYTES = 448 << 10;  // of a block's transformed patches: they stay in L2 beside a strip's sums
constexpr int64_t LEAST_BLOCK = 24, LARGEST_BLOCK = 96;  // patches: few would read all weights too often
constexpr double READING_WEIGHTS = 0.5;  // all of them, in products of ROWS patches
constexpr int64_t WEIGHT_BYTES = 20 << 20;  // transformed at a time
constexpr int64_t MOST_CHANNELS = 4096;     // for which rounding leaves the norms below where sums leave int32

// How patches are divided into blocks.
struct Blocks {
    int64_t rows, across;  // of a block, in patches
    int64_t size() const { return rows * across; }
};

// Blocks that the products' tiles fit well, and that do not read the weights too often.
template <typename T>
Blocks best_blocks(const Problem& p, int threads) {
    const int64_t fits = BLOCK_BYTES / (POINTS * p.C * (int64_t)sizeof(Factor<T>));
    const int64_t share = std::max((p.patches() + threads - 1) / threads, p.N);
    const int64_t most = std::min(std::clamp(fits, LEAST_BLOCK, LARGEST_BLOCK), share);
    Blocks best{1, 1};
    double least = 1e30;
    for (int64_t across = 1; across <= std::min(most, p.across()); ++across)
        for (int64_t rows = 1; rows * across <= most && rows <= p.down(); ++rows) {
            const auto parts = [](int64_t whole, int64_t part) { return std::pair(whole / part, whole % part); };
            const auto [down, below] = parts(p.down(), rows);
            const auto [along, beside] = parts(p.across(), across);
            const auto cost = [](int64_t count, int64_t size) {
                return size ? count * (READING_WEIGHTS + (size + ROWS - 1) / ROWS) : 0.0;
            };
            const double all = cost(down * along, rows * across) + cost(down, rows * beside) +
                               cost(along, below * across) + cost(1, below * beside);
            if (all < least) least = all, best = {rows, across};
        }
    return best;
}

// Patches [row, row + rows) x [column, column + across) of one image.
struct Block {
    int64_t image, row, column, rows, across;
    int64_t size() const { return rows * across; }
};

template <typename T>
struct Scratch {
    __m512* staged;         // [C / 16][36] of one patch
    Factor<T>* patches;     // [36][block][C]
    float* patch_scales;    // [36][block]
    float* products;        // [block][36][STRIP]
    T* zeros;               // a pixel beyond the image
};

// The patch as integers, point by point, and their scales.
inline void quantise(const __m512 (&squares)[POINTS], const __m512* staged, int64_t C, int64_t block, int16_t* to,
                     float* scales) {
    alignas(64) float scale[3 * LANES], inverse[3 * LANES];
    for (int point = 0; point < POINTS; point += 4) _mm_store_ps(scale + point, sums(squares + point));
    for (int i = 0; i < 3; ++i) {
        const __m512 norm = times(1.0f / PATCH_NORM, _mm512_sqrt_ps(_mm512_load_ps(scale + i * LANES)));
        const __mmask16 some = _mm512_cmp_ps_mask(norm, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        _mm512_store_ps(scale + i * LANES, norm);
        _mm512_store_ps(inverse + i * LANES, _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), norm));
    }
    for (int point = 0; point < POINTS; ++point, to += block * C, ++staged) {
        scales[point * block] = scale[point];
        const __m512 by = _mm512_set1_ps(inverse[point]);
        int64_t c = 0;
        for (const __m512* from = staged; c + 2 * LANES <= C; c += 2 * LANES, from += 2 * POINTS) {
            const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(from[0], by));
            const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(from[POINTS], by));
            _mm512_storeu_si512(to + c, _mm512_packs_epi32(low, high));
        }
        if (c < C) {
            const __m512i last = _mm512_cvtps_epi32(_mm512_mul_ps(staged[c / LANES * POINTS], by));
            _mm256_storeu_si256((__m256i*)(to + c), _mm512_cvtsepi32_epi16(last));
        }
    }
}

// Lines of pixels, column by column, at points: [C / 16][36]. In passes of their own, for which registers suffice.
template <typename T>
void columns_at_points(const T* const (&pixels)[POINTS], int64_t C, __m512* staged) {
    for (int64_t c = 0; c < C; c += LANES, staged += POINTS)
        for (int j = 0; j < EDGE; ++j) {
            __m512 x[EDGE], y[EDGE];
            UNROLL for (int i = 0; i < EDGE; ++i) x[i] = load(pixels[i * EDGE + j] + c);
            at_points(x, y);
            UNROLL for (int i = 0; i < EDGE; ++i) staged[i * EDGE + j] = y[i];
        }
}

template <typename T>
void transform_patch(const T* const (&pixels)[POINTS], int64_t C, int64_t block, __m512* staged, Factor<T>* to,
                     float* scales) {
    __m512 squares[POINTS];
    columns_at_points(pixels, C, staged);
    for (int i = 0; i < POINTS; i += EDGE) {
        __m512 square[EDGE];
        UNROLL for (int j = 0; j < EDGE; ++j) square[j] = _mm512_setzero_ps();
        __m512* line = staged + i;
        for (int64_t c = 0; c < C; c += LANES, line += POINTS) {
            __m512 x[EDGE], y[EDGE];
            UNROLL for (int j = 0; j < EDGE; ++j) x[j] = line[j];
            at_points(x, y);
            UNROLL for (int j = 0; j < EDGE; ++j) {
                if constexpr (INTEGERS<T>) {
                    line[j] = y[j];
                    square[j] = _mm512_fmadd_ps(y[j], y[j], square[j]);
                } else {
                    _mm512_storeu_ps(to + (i + j) * block * C + c, y[j]);
                }
            }
        }
        UNROLL for (int j = 0; j < EDGE; ++j) squares[i + j] = square[j];
    }
    if constexpr (INTEGERS<T>) quantise(squares, staged, C, block, to, scales);
}

template <typename T, int TAPS>
void transform_patches(const Problem& p, const Block& b, int64_t block, const Scratch<T>& s) {
    constexpr int TILE = EDGE + 1 - TAPS;
    const T* x = static_cast<const T*>(p.x) + b.image * p.H * p.W * p.C;
    for (int64_t patch = 0; patch < b.size(); ++patch) {
        const int64_t row = (b.row + patch / b.across) * TILE - p.top;
        const int64_t column = (b.column + patch % b.across) * TILE - p.left;
        const T* pixels[POINTS];
        for (int i = 0; i < POINTS; ++i) {
            const int64_t r = row + i / EDGE, c = column + i % EDGE;
            pixels[i] = r >= 0 && r < p.H && c >= 0 && c < p.W ? x + (r * p.W + c) * p.C : s.zeros;
        }
        transform_patch<T>(pixels, p.C, block, s.staged, s.patches + patch * p.C, s.patch_scales + patch);
    }
}

inline __m512i accumulate(__m512i sum, __m512i weight, const int16_t* patch) {
    int32_t pair;
    std::memcpy(&pair, patch, sizeof pair);
    return _mm512_dpwssd_epi32(sum, _mm512_set1_epi32(pair), weight);
}

inline __m512 accumulate(__m512 sum, __m512 weight, const float* patch) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*patch), weight, sum);
}

inline __m512i read(const int16_t* weight) { return _mm512_loadu_si512(weight); }
inline __m512 read(const float* weight) { return _mm512_loadu_ps(weight); }

inline void keep(float* to, __m512i sum) { _mm512_store_si512(to, sum); }
inline void keep(float* to, __m512 sum) { _mm512_store_ps(to, sum); }

// HEIGHT patches times WIDTH registers of columns, at one point.
template <typename F, int HEIGHT, int WIDTH>
void multiply(const F* patches, const F* weights, int64_t C, float* products) {
    constexpr int64_t NEXT = sizeof(F) == 2 ? 2 : 1;
    using Sum = std::conditional_t<sizeof(F) == 2, __m512i, __m512>;
    Sum acc[HEIGHT][WIDTH];
    UNROLL for (auto& row : acc)
        UNROLL for (auto& sum : row) sum = Sum{};
    for (int64_t c = 0; c < C; c += NEXT, weights += WIDTH * LANES * NEXT) {
        Sum weight[WIDTH];
        UNROLL for (int j = 0; j < WIDTH; ++j) weight[j] = read(weights + j * LANES * NEXT);
        UNROLL for (int i = 0; i < HEIGHT; ++i)
            UNROLL for (int j = 0; j < WIDTH; ++j) acc[i][j] = accumulate(acc[i][j], weight[j], patches + i * C + c);
    }
    UNROLL for (int i = 0; i < HEIGHT; ++i)
        UNROLL for (int j = 0; j < WIDTH; ++j) keep(products + i * POINTS * STRIP + j * LANES, acc[i][j]);
}

template <typename T>
void multiply_strip(const Problem& p, int64_t count, int64_t block, int64_t column, const Weights<T>& weights,
                    const Scratch<T>& s) {
    const int64_t width = std::min(STRIP, weights.count - column), C = p.C;
    with_constant<COLUMNS>(width / LANES, [&](auto columns) {
        for (int64_t point = 0; point < POINTS; ++point)
            for (int64_t patch = 0; patch < count; patch += ROWS)
                with_constant<ROWS>(count - patch, [&](auto height) {
                    multiply<Factor<T>, decltype(height)::value, decltype(columns)::value>(
                        s.patches + (point * block + patch) * C, weights.at(column, point, width, C), C,
                        s.products + (patch * POINTS + point) * STRIP);
                });
    });
}

// Products of 16 columns of one patch -> a tile of results, at rows and columns of the image that are not negative.
template <typename T, int TILE>
void write_tile(const Problem& p, const float* products, const float* patch_scales, int64_t block,
                const float* column_scales, int64_t stride, const int64_t (&rows)[TILE],
                const int64_t (&columns)[TILE], int64_t image, int64_t output) {
    __m512 lines[TILE][EDGE];
    UNROLL for (int j = 0; j < EDGE; ++j) {
        __m512 y[EDGE], z[TILE];
        UNROLL for (int i = 0; i < EDGE; ++i) {
            const int point = i * EDGE + j;
            y[i] = _mm512_load_ps(products + point * STRIP);
            if constexpr (INTEGERS<T>) {
                const __m512 of_column = _mm512_loadu_ps(column_scales + point * stride);
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_castps_si512(y[i]));
                y[i] = _mm512_mul_ps(sum, times(patch_scales[point * block], of_column));
            }
        }
        from_points<TILE>(y, z);
        UNROLL for (int i = 0; i < TILE; ++i) lines[i][j] = z[i];
    }
    const __m512 bias = p.bias ? load(static_cast<const T*>(p.bias) + output) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < TILE; ++i) {
        if (rows[i] < 0) continue;
        const int64_t line = (image * p.out_height() + rows[i]) * p.out_width() * p.O + output;
        __m512 z[TILE];
        from_points<TILE>(lines[i], z);
        UNROLL for (int j = 0; j < TILE; ++j) {
            if (columns[j] < 0) continue;
            const int64_t at = line + columns[j] * p.O;
            __m512 result = _mm512_add_ps(z[j], bias);
            if (p.residual) result = _mm512_add_ps(result, load(static_cast<const T*>(p.residual) + at));
            store(static_cast<T*>(p.out) + at, result);
        }
    }
}

template <typename T, int TAPS>
void write_strip(const Problem& p, const Block& b, int64_t block, int64_t column, const Weights<T>& weights,
                 const Scratch<T>& s) {
    constexpr int TILE = EDGE + 1 - TAPS;
    const int64_t width = std::min(STRIP, weights.count - column);
    for (int64_t patch = 0; patch < b.size(); ++patch) {
        const int64_t row = (b.row + patch / b.across) * TILE, left = (b.column + patch % b.across) * TILE;
        for (int64_t group = 0; group < width; group += LANES) {
            const int64_t all = weights.first + column + group, phase = all / p.O;
            // A result goes to where it stands, or beside its neighbours of the other phases.
            const auto place = [&](int64_t at, int64_t end, int64_t half) {
                if (TAPS == 2) at = 2 * at - half;
                return at < end ? at : -1;
            };
            int64_t rows[TILE], columns[TILE];
            for (int i = 0; i < TILE; ++i) {
                rows[i] = place(row + i, p.out_height(), phase / 2);
                columns[i] = place(left + i, p.out_width(), phase % 2);
            }
            write_tile<T, TILE>(p, s.products + patch * POINTS * STRIP + group, s.patch_scales + patch, block,
                                weights.scales + column + group, weights.count, rows, columns, b.image, all % p.O);
        }
    }
}

inline int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <typename T, int TAPS>
bool convolve(const Problem& p, int threads) {
    const int64_t C = p.C, column_bytes = POINTS * C * sizeof(Factor<T>);
    const int64_t at_once = std::min(std::max(WEIGHT_BYTES / column_bytes / STRIP, (int64_t)1) * STRIP, p.columns());
    const Blocks size = best_blocks<T>(p, threads);
    const int64_t patches = size.size(), weight_bytes = column_bytes * at_once;
    const int64_t scale_bytes = INTEGERS<T> ? POINTS * at_once * sizeof(float) : 0;
    const int64_t patch_bytes = rounded(column_bytes * patches), staged_bytes = POINTS * C * sizeof(float);
    const int64_t product_bytes = patches * POINTS * STRIP * sizeof(float), tap_bytes = 9 * C * sizeof(__m512);
    const int64_t patch_scale_bytes = rounded(POINTS * patches * sizeof(float)), zero_bytes = rounded(C * sizeof(T));
    const int64_t large_bytes = std::max(patch_bytes + product_bytes + staged_bytes, tap_bytes);
    const int64_t own_bytes = large_bytes + patch_scale_bytes + zero_bytes;
    char* memory = static_cast<char*>(std::aligned_alloc(64, weight_bytes + scale_bytes + threads * own_bytes));
    if (!memory) return false;
    const int64_t down = (p.down() + size.rows - 1) / size.rows, across = (p.across() + size.across - 1) / size.across;
    const int64_t blocks = p.N * down * across;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        char* own = memory + weight_bytes + scale_bytes + thread * own_bytes;
        char* last = own + own_bytes - patch_scale_bytes - zero_bytes;
        const Scratch<T> s{reinterpret_cast<__m512*>(own + patch_bytes + product_bytes),
                           reinterpret_cast<Factor<T>*>(own), reinterpret_cast<float*>(last),
                           reinterpret_cast<float*>(own + patch_bytes), reinterpret_cast<T*>(last + patch_scale_bytes)};
        std::memset(s.zeros, 0, C * sizeof(T));
        for (int64_t first = 0; first < p.columns(); first += at_once) {
            const Weights<T> weights{first, std::min(at_once, p.columns() - first),
                                     reinterpret_cast<Factor<T>*>(memory),
                                     reinterpret_cast<float*>(memory + weight_bytes)};
#pragma omp for
            for (int64_t column = 0; column < weights.count; column += LANES)
                transform_weights<T, TAPS>(p, first + column, weights, reinterpret_cast<__m512*>(own));
            for (int64_t i = blocks * thread / count; i < blocks * (thread + 1) / count; ++i) {
                const int64_t row = i / across % down * size.rows, column = i % across * size.across;
                const Block b{i / (across * down), row, column, std::min(size.rows, p.down() - row),
                              std::min(size.across, p.across() - column)};
                transform_patches<T, TAPS>(p, b, patches, s);
                for (int64_t strip = 0; strip < weights.count; strip += STRIP) {
                    multiply_strip<T>(p, b.size(), patches, strip, weights, s);
                    write_strip<T, TAPS>(p, b, patches, strip, weights, s);
                }
            }
#pragma omp barrier
        }
    }
    std::free(memory);
    return true;
}

}  // namespace

enum Status : int32_t { OK, UNSUPPORTED_SIZE, NO_MEMORY };

// All tensors contiguous, in bfloat16 or else in fp32; bias and residual may be null.
extern "C" __attribute__((visibility("default"))) int32_t fastvar_winograd(
    const void* x, const void* weight, const void* bias, const void* residual, void* out, int64_t N, int64_t H,
    int64_t W, int64_t C, int64_t O, int32_t pads_rows, int32_t pads_columns, int32_t enlarges, int32_t bfloat16,
    int32_t threads) {
    const Problem p{x, weight, bias, residual, out, N, H, W, C, O, pads_rows, pads_columns, enlarges != 0};
    if (C <= 0 || C % LANES || C > MOST_CHANNELS || O <= 0 || O % LANES || (enlarges && !(pads_rows && pads_columns)))
        return UNSUPPORTED_SIZE;
    if (N <= 0 || p.height() <= 0 || p.width() <= 0) return OK;
    if (p.patches() * POINTS * C * p.columns() < WORTH_THREADS) threads = 1;
    const auto run = enlarges ? (bfloat16 ? convolve<Bits, 2> : convolve<float, 2>)
                              : (bfloat16 ? convolve<Bits, 3> : convolve<float, 3>);
    return run(p, threads) ? OK : NO_MEMORY;
}

// What a compiled program calls for fastvar::winograd; the op's fake implementation has checked shapes and types.
extern "C" AOTITorchError aoti_torch_cpu_winograd(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                                  AtenTensorHandle* residual, int32_t pads_rows, int32_t pads_columns,
                                                  int32_t enlarges, AtenTensorHandle* out) {
    const AtenTensorHandle inputs[4] = {x, weight, bias ? *bias : x, residual ? *residual : x};
    void *data[4], *result;
    int64_t *sizes, *weight_sizes;
    int32_t type;
    bool ok = !aoti_torch_get_sizes(x, &sizes) && !aoti_torch_get_sizes(weight, &weight_sizes) &&
              !aoti_torch_get_dtype(x, &type);
    for (int i = 0; i < 4; ++i) ok = ok && !aoti_torch_get_data_ptr(inputs[i], &data[i]);
    if (!ok) return AOTI_TORCH_FAILURE;
    const Problem p{data[0], data[1], nullptr, nullptr, nullptr, sizes[0], sizes[1], sizes[2], sizes[3],
                    weight_sizes[0], pads_rows, pads_columns, enlarges != 0};
    const int64_t out_sizes[4] = {p.N, p.out_height(), p.out_width(), p.O};
    const int64_t out_strides[4] = {out_sizes[1] * out_sizes[2] * p.O, out_sizes[2] * p.O, p.O, 1};
    if (aoti_torch_empty_strided(4, out_sizes, out_strides, type, aoti_torch_device_type_cpu(), 0, out) ||
        aoti_torch_get_data_ptr(*out, &result))
        return AOTI_TORCH_FAILURE;
    const int32_t status = fastvar_winograd(
        p.x, p.weight, bias ? data[2] : nullptr, residual ? data[3] : nullptr, result, p.N, p.H, p.W, p.C, p.O,
        pads_rows, pads_columns, enlarges, type == aoti_torch_dtype_bfloat16(), omp_get_max_threads());
    return status == OK ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
