// softmax(q keys^T + bias) values in bfloat16 on CPUs with AVX512-BF16, as flash attention goes about it: scores never
// leave the cache. Knows plain memory and, at the end, the C interface of programs that AOTInductor compiles; no model.
//
// Layout: q and out [L, heads, head_dim], keys and values [S, heads, head_dim], bfloat16. Scores, softmax and sums are
// fp32; probabilities are rounded to bfloat16 for the product with the values.
//
// VDPBF16PS multiplies 16 lanes of pairs, neighbours along the summed axis, so keys are packed as
// [head_dim / 2][key][2] and values as [key / 2][head_dim][2]; queries and probabilities are broadcast pair by pair.
// Work items are (head, block of queries) in that order, and each thread takes one contiguous range of them: it packs a
// head when it first meets it, and no thread waits for another. A row's sums run in the same order whatever block or
// thread it falls to, so results do not depend on either.
//
// With int8, queries become integers by a scale of each row, keys by one of each strip; products are exact in int32.
// VPDPBUSD multiplies 16 lanes of 4 neighbours, unsigned times signed: keys are the unsigned ones, shifted by 128; what
// that adds is 128 * (sum of the row's queries), with whose negative sums begin. Keys are packed as
// [head_dim / 4][key][4]. Probabilities are then the unsigned ones, in 255ths of the largest of their row and block of
// keys, and values become integers by a scale of each channel and block. Many small probabilities can weigh more than
// the largest, so they are not rounded to the nearest, which would be zero: numbers that are spread evenly over a block
// are added first, and the mean over keys stays what it was.
//
// Scratch per thread, freed at the end: one head packed, (4 * head_dim + 8) * S bytes, and 0.25 MB.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "attention_packing.h"

namespace {

inline __m512bh pairs(__m512i bits) { return (__m512bh)bits; }

// 2^t for t <= 0 within 2e-7; exactly 1 at 0 and 0 at minus infinity. VSCALEFPS multiplies by 2^floor(t).
inline __m512 exp2(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, 0x09);  // t - floor(t)
    __m512 p = _mm512_set1_ps(0.00186713083f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00901702868f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0557999143f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24016445f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693151312f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, t);
}

// 255 * 2^t for t <= 0 within 0.03.
inline __m512 exp2_of_255(__m512 t) {
    const __m512 f = _mm512_reduce_ps(t, 0x09);
    __m512 p = _mm512_set1_ps(255 * 0.07751164f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255 * 0.22748836f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255 * 0.695f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255.0f));
    return _mm512_scalef_ps(p, t);
}

// Integer products of a tile -> the largest score of each row so far; and scores in place of the products where some
// keys are masked. Of the others `softmax_block` makes the scores.
template <int COLUMNS>
__attribute__((noinline)) void scale_tile(const float* q_scale, float key_scale, int rows, const float* bias,
                                          float* scores, float* lane_max) {
    for (int i = 0; i < rows; ++i, scores += KEYS, lane_max += LANES) {
        const __m512 scale = _mm512_set1_ps(q_scale[i] * key_scale);
        __m512 largest = _mm512_load_ps(lane_max);
        if (bias) {
            UNROLL for (int j = 0; j < COLUMNS; ++j) {
                const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(scores + j * LANES));
                const __m512 score = _mm512_fmadd_ps(product, scale, _mm512_loadu_ps(bias + j * LANES));
                _mm512_store_ps(scores + j * LANES, score);
                largest = _mm512_max_ps(largest, score);
            }
        } else {
            __m512i product = _mm512_load_si512(scores);
            UNROLL for (int j = 1; j < COLUMNS; ++j)
                product = _mm512_max_epi32(product, _mm512_load_si512(scores + j * LANES));
            largest = _mm512_max_ps(largest, _mm512_mul_ps(_mm512_cvtepi32_ps(product), scale));
        }
        _mm512_store_ps(lane_max, largest);
    }
}

// ROWS queries times 16 * COLUMNS keys -> scores, and the largest of each row so far. `row`: the first query's place in
// the block, `key` the first key's in the head.
template <int ROWS, int COLUMNS, bool INT8>
void score_tile(const Problem& p, Scratch& s, int64_t row, int64_t key, const float* bias, float* scores) {
    using Sums = std::conditional_t<INT8, __m512i, __m512>;
    const int64_t depth = p.depth();
    const Pair *q = s.q + row * depth, *keys = s.keys + key * depth;
    Sums acc[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j)
            if constexpr (INT8)
                acc[i][j] = _mm512_set1_epi32(-s.q_shift[row + i]);
            else
                acc[i][j] = _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; ++d, q += TILE, keys += COLUMNS * LANES) {
        __m512i lanes[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; ++j) lanes[j] = _mm512_loadu_si512(keys + j * LANES);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const __m512i query = _mm512_set1_epi32(q[i]);
            UNROLL for (int j = 0; j < COLUMNS; ++j)
                if constexpr (INT8)
                    acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], lanes[j], query);
                else
                    acc[i][j] = _mm512_dpbf16_ps(acc[i][j], pairs(query), pairs(lanes[j]));
        }
    }
    float* lane_max = s.lane_max + row * LANES;
    if constexpr (INT8) {  // through memory: what follows would take registers from the loop
        UNROLL for (int i = 0; i < ROWS; ++i)
            UNROLL for (int j = 0; j < COLUMNS; ++j) _mm512_store_si512(scores + i * KEYS + j * LANES, acc[i][j]);
        return scale_tile<COLUMNS>(s.q_scale + row, s.key_scale[key / STRIP], ROWS, bias, scores, lane_max);
    }
    UNROLL for (int i = 0; i < ROWS; ++i) {
        __m512 largest = _mm512_load_ps(lane_max + i * LANES);
        UNROLL for (int j = 0; j < COLUMNS; ++j) {
            __m512 score = (__m512)acc[i][j];
            if (bias) score = _mm512_add_ps(score, _mm512_loadu_ps(bias + j * LANES));
            _mm512_store_ps(scores + i * KEYS + j * LANES, score);
            largest = _mm512_max_ps(largest, score);
        }
        _mm512_store_ps(lane_max + i * LANES, largest);
    }
}

// sums [ROWS, 16 * COLUMNS of head_dim] = sums * correction + probabilities values.
template <int ROWS, int COLUMNS>
void value_tile(const Pair* probabilities, const Pair* values, int64_t depth, int64_t head_dim,
                const float* correction, float* sums) {
    __m512 acc[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j)
            acc[i][j] = _mm512_mul_ps(_mm512_load_ps(sums + i * head_dim + j * LANES), _mm512_set1_ps(correction[i]));
    for (int64_t d = 0; d < depth; ++d, ++probabilities, values += head_dim) {
        __m512bh value[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; ++j) value[j] = pairs(_mm512_loadu_si512(values + j * LANES));
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const __m512bh weight = pairs(_mm512_set1_epi32(probabilities[i * KEYS / 2]));
            UNROLL for (int j = 0; j < COLUMNS; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], weight, value[j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) _mm512_store_ps(sums + i * head_dim + j * LANES, acc[i][j]);
}

template <int COLUMNS>
__attribute__((noinline)) void add_products(const int32_t* products, int rows, int64_t head_dim,
                                            const float* correction, const float* block_scale,
                                            const float* value_scale, float* sums) {
    for (int i = 0; i < rows; ++i, products += COLUMNS * LANES, sums += head_dim)
        UNROLL for (int j = 0; j < COLUMNS; ++j) {
            const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + j * LANES));
            const __m512 of_value = _mm512_loadu_ps(value_scale + j * LANES);
            const __m512 scale = _mm512_mul_ps(of_value, _mm512_set1_ps(block_scale[i]));
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(sums + j * LANES), _mm512_set1_ps(correction[i]));
            _mm512_store_ps(sums + j * LANES, _mm512_fmadd_ps(product, scale, before));
        }
}

// The same with int8: sums * correction + block_scale * value_scale * (probabilities values).
template <int ROWS, int COLUMNS>
void value_tile_int8(const Pair* probabilities, const Pair* values, int64_t depth, int64_t head_dim,
                     const float* correction, const float* block_scale, const float* value_scale, float* sums) {
    __m512i acc[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) acc[i][j] = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; ++d, ++probabilities, values += head_dim) {
        __m512i value[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; ++j) value[j] = _mm512_loadu_si512(values + j * LANES);
        UNROLL for (int i = 0; i < ROWS; ++i) {
            const __m512i weight = _mm512_set1_epi32(probabilities[i * KEYS / 4]);
            UNROLL for (int j = 0; j < COLUMNS; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], weight, value[j]);
        }
    }
    alignas(64) int32_t products[ROWS][COLUMNS * LANES];  // through memory, as `scale_tile`
    UNROLL for (int i = 0; i < ROWS; ++i)
        UNROLL for (int j = 0; j < COLUMNS; ++j) _mm512_store_si512(products[i] + j * LANES, acc[i][j]);
    add_products<COLUMNS>(products[0], ROWS, head_dim, correction, block_scale, value_scale, sums);
}

// Whether the bias of a strip's keys is to be added.
bool is_masked(const Problem& p, int64_t strip) { return p.bias || strip + STRIP > p.S; }

void score_block(const Problem& p, Scratch& s, int64_t rows, int64_t start, int64_t count) {
    for (int64_t key = start; key < start + count; key += STRIP) {
        const float* bias = is_masked(p, key) ? s.bias + key : nullptr;
        with_constant<STRIP / LANES>((start + count - key) / LANES, [&](auto columns) {
            for (int64_t i = 0; i < rows; i += TILE)
                with_constant<TILE>(rows - i, [&](auto height) {
                    constexpr int ROWS = decltype(height)::value, COLUMNS = decltype(columns)::value;
                    (p.int8 ? score_tile<ROWS, COLUMNS, true> : score_tile<ROWS, COLUMNS, false>)(
                        p, s, i, key, bias, s.scores + i * KEYS + key - start);
                });
        });
    }
}

// Scores of a block -> probabilities relative to the largest score so far, and what earlier sums are to be scaled by.
void softmax_block(const Problem&, Scratch& s, int64_t rows, int64_t, int64_t count) {
    const __m512 log2e = _mm512_set1_ps(LOG2_E);
    for (int64_t i = 0; i < rows; ++i) {
        const float before = s.row_max[i], now = _mm512_reduce_max_ps(_mm512_load_ps(s.lane_max + i * LANES));
        const __m512 largest = _mm512_set1_ps(now);
        const float* scores = s.scores + i * KEYS;
        Pair* probabilities = s.probabilities + i * KEYS / 2;
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t key = 0; key < count; key += 2 * LANES) {
            __m512 a = _mm512_load_ps(scores + key), b = _mm512_load_ps(scores + key + LANES);
            a = exp2(_mm512_mul_ps(_mm512_sub_ps(a, largest), log2e));  // the subtraction exact: a mask may be -1e30
            b = exp2(_mm512_mul_ps(_mm512_sub_ps(b, largest), log2e));
            sum[0] = _mm512_add_ps(sum[0], a);
            sum[1] = key + LANES < count ? _mm512_add_ps(sum[1], b) : sum[1];  // scores behind the last are stale
            _mm512_store_si512(probabilities + key / 2, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        const __m512 scale = exp2(_mm512_set1_ps((before - now) * LOG2_E));
        s.correction[i] = _mm512_cvtss_f32(scale);
        s.row_sum[i] = s.row_sum[i] * s.correction[i] + _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
        s.row_max[i] = now;
        _mm512_store_ps(s.lane_max + i * LANES, largest);
    }
}

// The same with int8: probabilities are relative to the largest score of the block, and uint8.
void softmax_block_int8(const Problem& p, Scratch& s, int64_t rows, int64_t start, int64_t count) {
    const __m512 log2e = _mm512_set1_ps(LOG2_E);
    for (int64_t i = 0; i < rows; ++i) {
        const float before = s.row_max[i], here = _mm512_reduce_max_ps(_mm512_load_ps(s.lane_max + i * LANES));
        const float now = std::max(before, here);
        const __m512 largest = _mm512_set1_ps(here), of_largest = _mm512_mul_ps(largest, log2e);
        uint8_t* probabilities = (uint8_t*)(s.probabilities + i * KEYS / 4);
        __m512i sum = _mm512_setzero_si512();
        __m512 no_number = _mm512_setzero_ps();  // or zero: integers would swallow it
        for (int64_t strip = 0; strip < count; strip += STRIP) {
            const bool masked = is_masked(p, start + strip);
            const __m512 scale = _mm512_set1_ps(s.q_scale[i] * s.key_scale[(start + strip) / STRIP] * LOG2_E);
            no_number = _mm512_fmadd_ps(scale, _mm512_setzero_ps(), no_number);
            for (int64_t key = strip; key < std::min(count, strip + STRIP); key += LANES) {
                const __m512 score = _mm512_load_ps(s.scores + i * KEYS + key);  // or product
                const __m512 product = _mm512_cvtepi32_ps(_mm512_castps_si512(score));
                // the subtraction exact where a mask may be -1e30
                const __m512 t = masked ? _mm512_mul_ps(_mm512_sub_ps(score, largest), log2e)
                                        : _mm512_fmsub_ps(product, scale, of_largest);
                const __m512 dithered = _mm512_add_ps(exp2_of_255(t), _mm512_load_ps(s.dither + key));
                const __m512i rounded = _mm512_cvtps_epi32(dithered);
                sum = _mm512_add_epi32(sum, rounded);
                _mm_store_si128((__m128i*)(probabilities + key), _mm512_cvtusepi32_epi8(rounded));
            }
        }
        s.correction[i] = _mm512_cvtss_f32(exp2(_mm512_set1_ps((before - now) * LOG2_E)));
        s.block_scale[i] = _mm512_cvtss_f32(exp2(_mm512_set1_ps((here - now) * LOG2_E)));
        s.row_sum[i] = s.row_sum[i] * s.correction[i] + _mm512_cvtss_f32(no_number) +
                       s.block_scale[i] * _mm512_reduce_add_epi32(sum);
        s.row_max[i] = now;
        _mm512_store_ps(s.lane_max + i * LANES, _mm512_set1_ps(-FLT_MAX));
    }
}

// Registers of head_dim in parts of up to 6; the wider the part, the fewer rows fit beside it.
void value_block(const Problem& p, Scratch& s, int64_t rows, int64_t start, int64_t count) {
    const int64_t registers = p.head_dim / LANES, parts = (registers + WIDEST - 1) / WIDEST;
    const int64_t neighbours = p.neighbours(), depth = (std::min(count, p.S - start) + neighbours - 1) / neighbours;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = registers * part / parts, to = registers * (part + 1) / parts;
        with_constant<WIDEST>(to - from, [&](auto columns) {
            constexpr int MOST = columns > 4 ? 4 : TILE;
            for (int64_t i = 0; i < rows; i += MOST)
                with_constant<MOST>(rows - i, [&](auto height) {
                    constexpr int ROWS = decltype(height)::value, COLUMNS = decltype(columns)::value;
                    const Pair *weights = s.probabilities + i * KEYS / neighbours,
                               *values = s.values + start / neighbours * p.head_dim + from * LANES;
                    float* sums = s.sums + i * p.head_dim + from * LANES;
                    if (p.int8)
                        value_tile_int8<ROWS, COLUMNS>(
                            weights, values, depth, p.head_dim, s.correction + i, s.block_scale + i,
                            s.value_scale + start / KEYS * p.head_dim + from * LANES, sums);
                    else
                        value_tile<ROWS, COLUMNS>(weights, values, depth, p.head_dim, s.correction + i, sums);
                });
        });
    }
}

void attend_block(const Problem& p, Scratch& s, int64_t head, int64_t start) {
    const int64_t rows = std::min(QUERIES, p.L - start), padded = p.padded();
    pack_queries(p, head, start, rows, s);
    std::fill_n(s.sums, rows * p.head_dim, 0.0f);
    std::fill_n(s.row_sum, rows, 0.0f);
    std::fill_n(s.row_max, rows, -FLT_MAX);  // finite: the difference of two infinities would be no number
    std::fill_n(s.lane_max, rows * LANES, -FLT_MAX);
    for (int64_t key = 0; key < padded; key += KEYS) {
        const int64_t count = std::min(KEYS, padded - key);
        score_block(p, s, rows, key, count);
        (p.int8 ? softmax_block_int8 : softmax_block)(p, s, rows, key, count);
        value_block(p, s, rows, key, count);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const __m512 scale = _mm512_set1_ps(1.0f / s.row_sum[i]);
        uint16_t* out = p.out + ((start + i) * p.heads + head) * p.head_dim;
        for (int64_t d = 0; d < p.head_dim; d += LANES)
            _mm256_storeu_si256((__m256i*)(out + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                                                         _mm512_load_ps(s.sums + i * p.head_dim + d), scale)));
    }
}

// Work items [from, to): head-major, so that a head's keys and values are packed once.
bool attend(const Problem& p, int64_t from, int64_t to) {
    if (from >= to) return true;
    const int64_t padded = p.padded(), packed = padded * p.head_dim / 2 * sizeof(Pair);  // int8 takes half of it
    const int64_t floats = 2 * padded + p.blocks() * p.head_dim;
    const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t fixed = rounded(sizeof(Scratch));
    char* memory = static_cast<char*>(std::aligned_alloc(64, rounded(fixed + 2 * packed + floats * sizeof(float))));
    if (!memory) return false;
    Scratch& s = *reinterpret_cast<Scratch*>(memory);
    s.keys = reinterpret_cast<Pair*>(memory + fixed);
    s.values = reinterpret_cast<Pair*>(memory + fixed + packed);
    s.bias = reinterpret_cast<float*>(memory + fixed + 2 * packed);
    s.key_scale = s.bias + padded;
    s.value_scale = s.key_scale + padded;
    for (int64_t key = 0; key < KEYS; ++key) {  // multiples of the golden ratio, in (-0.5, 0.5)
        const double x = key * 0.6180339887498949;
        s.dither[key] = 0.998 * (x - std::floor(x)) - 0.499;
    }
    const int64_t blocks = (p.L + QUERIES - 1) / QUERIES;
    for (int64_t item = from; item < to; ++item) {
        const int64_t head = item / blocks, block = item % blocks;
        if (item == from || block == 0) {
            pack_keys(p, head, s);
            p.int8 ? pack_int8_values(p, head, s) : pack_values(p, head, s.values);
            pack_bias(p, head, s.bias);
        }
        attend_block(p, s, head, block * QUERIES);
    }
    std::free(memory);
    return true;
}

}  // namespace

enum Status : int32_t { OK, UNSUPPORTED_HEAD, NO_KEYS, NO_MEMORY };

// Strides are (token, head) in elements, head_dim lies contiguous; out is contiguous. bias [heads, S] may be null.
extern "C" __attribute__((visibility("default"))) int32_t fastvar_attention(
    const void* q, const int64_t* q_strides, const void* keys, const int64_t* key_strides, const void* values,
    const int64_t* value_strides, const float* bias, int64_t bias_stride, void* out, int64_t L, int64_t S,
    int64_t heads, int64_t head_dim, int32_t int8, int32_t threads) {
    if (head_dim <= 0 || head_dim % LANES || head_dim > LARGEST_HEAD) return UNSUPPORTED_HEAD;
    if (S <= 0) return NO_KEYS;
    const auto tensor = [](const void* data, const int64_t* strides) {
        return Tensor{static_cast<const uint16_t*>(data), strides[0], strides[1]};
    };
    const Problem p{tensor(q, q_strides), tensor(keys, key_strides), tensor(values, value_strides), bias, bias_stride,
                    static_cast<uint16_t*>(out), L, S, heads, head_dim, int8 != 0};
    const int64_t items = heads * ((L + QUERIES - 1) / QUERIES);
    if (L * S * heads * head_dim < WORTH_THREADS) threads = 1;
    bool done = true;
#pragma omp parallel num_threads(threads) reduction(&& : done)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        done = attend(p, items * thread / count, items * (thread + 1) / count);
    }
    return done ? OK : NO_MEMORY;
}

// What a compiled program calls for fastvar::attention; the op's fake implementation has checked shapes and types.
extern "C" AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle keys, AtenTensorHandle values,
                                                   AtenTensorHandle* bias, int32_t int8, AtenTensorHandle* out) {
    AtenTensorHandle inputs[4] = {q, keys, values, bias ? *bias : q};
    void *data[4], *result;
    int64_t *sizes[2], *strides[4];
    bool ok = true;
    for (int i = 0; i < 4; ++i)
        ok = ok && !aoti_torch_get_data_ptr(inputs[i], &data[i]) && !aoti_torch_get_strides(inputs[i], &strides[i]);
    ok = ok && !aoti_torch_get_sizes(q, &sizes[0]) && !aoti_torch_get_sizes(keys, &sizes[1]);
    if (!ok) return AOTI_TORCH_FAILURE;
    const int64_t heads = sizes[0][1], head_dim = sizes[0][2], out_strides[3] = {heads * head_dim, head_dim, 1};
    if (aoti_torch_empty_strided(3, sizes[0], out_strides, aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0,
                                 out) ||
        aoti_torch_get_data_ptr(*out, &result))
        return AOTI_TORCH_FAILURE;
    const int32_t status = fastvar_attention(
        data[0], strides[0], data[1], strides[1], data[2], strides[2], bias ? static_cast<float*>(data[3]) : nullptr,
        strides[3][0], result, sizes[0][0], sizes[1][0], heads, head_dim, int8, omp_get_max_threads());
    return status == OK ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}
