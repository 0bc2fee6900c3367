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
// With int8 scores, queries become int8 by a scale of each row, keys by one of each strip; products are exact in int32.
// VPDPBUSD multiplies 16 lanes of 4 neighbours, unsigned times signed: keys are the unsigned ones, shifted by 128; what
// that adds is 128 * (sum of the row's queries), with whose negative sums begin. Keys are packed as
// [head_dim / 4][key][4].
//
// Scratch per thread, freed at the end: one head packed, (4 * head_dim + 8) * S bytes, and 0.25 MB.

#include <immintrin.h>
#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "quantise.h"
#include "registers.h"

namespace {

constexpr int TILE = 6;               // queries of a tile: with 4 registers of keys, 24 of the 32 registers are sums
constexpr int WIDEST = 6;             // registers of values of a tile, then of 4 queries
constexpr int64_t STRIP = 4 * LANES;  // keys of a tile: their packed pairs stay in L1 over all queries of a block
constexpr int64_t QUERIES = 48;       // of a block: enough to pay for reading packed keys from L2 or L3
constexpr int64_t KEYS = 512;         // of a block: its scores and probabilities stay in L2
constexpr int64_t LARGEST_HEAD = 256;
constexpr float LOG2_E = 1.44269504f;

using Pair = uint32_t;  // two bfloat16 neighbours of the summed axis, or four int8

struct Tensor {  // [tokens, heads, head_dim], head_dim contiguous; strides in elements
    const uint16_t* data;
    int64_t token_stride, head_stride;
    const uint16_t* row(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Problem {
    Tensor q, keys, values;
    const float* bias;  // [heads, S] or null
    int64_t bias_stride;
    uint16_t* out;
    int64_t L, S, heads, head_dim;
    bool int8;  // scores by int8 products
    int64_t padded() const { return (S + LANES - 1) / LANES * LANES; }
    int64_t depth() const { return head_dim / (int8 ? 4 : 2); }  // of what is packed of a key
};

struct Scratch {  // of one thread
    Pair *keys, *values;  // of the whole head: strips of [depth][strip's keys], and [padded / 2][head_dim]
    float *bias, *key_scale;  // [padded], minus infinity behind the last key; of each strip
    alignas(64) Pair q[QUERIES * LARGEST_HEAD / 2];  // per tile [depth][TILE]
    alignas(64) int8_t row[LANES * LARGEST_HEAD];    // quantised, before it is packed
    alignas(64) float scores[QUERIES * KEYS];
    alignas(64) Pair probabilities[QUERIES * KEYS / 2];
    alignas(64) float sums[QUERIES * LARGEST_HEAD];  // unnormalised output [QUERIES, head_dim]
    alignas(64) float lane_max[QUERIES * LANES];     // of a row's scores, lane by lane
    float row_max[QUERIES], row_sum[QUERIES], correction[QUERIES], q_scale[QUERIES];
    int32_t q_shift[QUERIES];  // what shifted keys add to a row's sums
};

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

// A strip's keys lie together, lane by lane: [depth][keys of the strip].
void pack_keys(const Problem& p, int64_t head, Scratch& s) {
    const int64_t depth = p.depth(), padded = p.padded();
    float most = SMALLEST;  // of a strip
    for (int64_t key = 0; key < padded; key += LANES) {
        const int64_t strip = key / STRIP * STRIP, width = std::min(STRIP, padded - strip);
        Pair* to = s.keys + strip * depth + (key - strip);
        if (p.int8 && key == strip) {
            most = SMALLEST;
            for (int64_t i = key; i < std::min(p.S, key + STRIP); ++i) {
                const float own = largest(p.keys.row(i, head), p.head_dim);
                if (!(own <= most)) most = own;  // of what is no number: that
                if (most != most) break;
            }
            s.key_scale[key / STRIP] = most / 127.0f;
        }
        const void* of_key[LANES];
        for (int64_t i = 0; i < LANES; ++i) {
            of_key[i] = key + i < p.S ? p.keys.row(key + i, head) : nullptr;
            if (p.int8 && of_key[i]) {
                quantise(p.keys.row(key + i, head), p.head_dim, most, s.row + i * LARGEST_HEAD);
                of_key[i] = s.row + i * LARGEST_HEAD;
            }
        }
        const __m512i shifted = p.int8 ? _mm512_set1_epi8(-128) : _mm512_setzero_si512();
        for (int64_t from = 0; from < depth; from += LANES) {
            const __mmask16 inside = depth - from >= LANES ? 0xffff : (1u << (depth - from)) - 1;
            __m512i rows[16];
            for (int64_t i = 0; i < LANES; ++i) {
                const Pair* row = static_cast<const Pair*>(of_key[i]) + from;
                rows[i] = of_key[i] ? _mm512_maskz_loadu_epi32(inside, row) : _mm512_setzero_si512();
                rows[i] = _mm512_xor_si512(rows[i], shifted);
            }
            transpose(rows);
            for (int64_t i = 0; i < std::min(LANES, depth - from); ++i)
                _mm512_storeu_si512(to + (from + i) * width, rows[i]);
        }
    }
}

// Two keys' values side by side: [S / 2][head_dim][2], a last odd key with zeros.
void pack_values(const Problem& p, int64_t head, Pair* packed) {
    for (int64_t key = 0; key < p.S; key += 2) {
        const uint16_t *first = p.values.row(key, head), *second = p.values.row(key + 1, head);
        for (int64_t d = 0; d < p.head_dim; d += LANES) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(first + d)));
            __m512i high = _mm512_setzero_si512();
            if (key + 1 < p.S) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(second + d)));
            _mm512_storeu_si512(packed + key / 2 * p.head_dim + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

void pack_bias(const Problem& p, int64_t head, float* packed) {
    for (int64_t key = 0; key < p.S; ++key) packed[key] = p.bias ? p.bias[head * p.bias_stride + key] : 0.0f;
    std::fill(packed + p.S, packed + p.padded(), -std::numeric_limits<float>::infinity());
}

void pack_queries(const Problem& p, int64_t head, int64_t start, int64_t count, Scratch& s) {
    const int64_t depth = p.depth();
    for (int64_t i = 0; i < count; ++i) {
        const char* row = (const char*)p.q.row(start + i, head);
        if (p.int8) {
            const uint16_t* q = p.q.row(start + i, head);
            const float most = std::max(largest(q, p.head_dim), SMALLEST);
            s.q_scale[i] = most / 127.0f;
            s.q_shift[i] = 128 * quantise(q, p.head_dim, most, s.row);
            row = (const char*)s.row;
        }
        Pair* to = s.q + i / TILE * depth * TILE + i % TILE;
        for (int64_t d = 0; d < depth; ++d) std::memcpy(to + d * TILE, row + d * sizeof(Pair), sizeof(Pair));
    }
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
void softmax_block(const Problem& p, Scratch& s, int64_t rows, int64_t start, int64_t count) {
    const __m512 log2e = _mm512_set1_ps(LOG2_E);
    for (int64_t i = 0; i < rows; ++i) {
        const float before = s.row_max[i], now = _mm512_reduce_max_ps(_mm512_load_ps(s.lane_max + i * LANES));
        const __m512 largest = _mm512_set1_ps(now);
        const float* scores = s.scores + i * KEYS;
        Pair* probabilities = s.probabilities + i * KEYS / 2;
        const __m512 of_largest = _mm512_mul_ps(largest, log2e);
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t key = 0; key < count; key += 2 * LANES) {
            __m512 a = _mm512_load_ps(scores + key), b = _mm512_load_ps(scores + key + LANES);
            if (p.int8 && !is_masked(p, (start + key) / STRIP * STRIP)) {
                const __m512 scale = _mm512_set1_ps(s.q_scale[i] * s.key_scale[(start + key) / STRIP] * LOG2_E);
                a = exp2(_mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(a)), scale, of_largest));
                b = exp2(_mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(b)), scale, of_largest));
            } else {  // the subtraction exact: a mask may be -1e30
                a = exp2(_mm512_mul_ps(_mm512_sub_ps(a, largest), log2e));
                b = exp2(_mm512_mul_ps(_mm512_sub_ps(b, largest), log2e));
            }
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

// Registers of head_dim in parts of up to 6; the wider the part, the fewer rows fit beside it.
void value_block(const Problem& p, Scratch& s, int64_t rows, int64_t start, int64_t count) {
    const int64_t registers = p.head_dim / LANES, parts = (registers + WIDEST - 1) / WIDEST;
    const int64_t depth = (std::min(count, p.S - start) + 1) / 2;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = registers * part / parts, to = registers * (part + 1) / parts;
        with_constant<WIDEST>(to - from, [&](auto columns) {
            constexpr int MOST = columns > 4 ? 4 : TILE;
            for (int64_t i = 0; i < rows; i += MOST)
                with_constant<MOST>(rows - i, [&](auto height) {
                    value_tile<decltype(height)::value, decltype(columns)::value>(
                        s.probabilities + i * KEYS / 2, s.values + start / 2 * p.head_dim + from * LANES, depth,
                        p.head_dim, s.correction + i, s.sums + i * p.head_dim + from * LANES);
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
        softmax_block(p, s, rows, key, count);
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
    const int64_t padded = p.padded(), packed = padded * p.head_dim / 2 * sizeof(Pair);  // int8 keys take half of it
    const auto rounded = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t fixed = rounded(sizeof(Scratch));
    char* memory = static_cast<char*>(std::aligned_alloc(64, rounded(fixed + 2 * packed + 2 * padded * sizeof(float))));
    if (!memory) return false;
    Scratch& s = *reinterpret_cast<Scratch*>(memory);
    s.keys = reinterpret_cast<Pair*>(memory + fixed);
    s.values = reinterpret_cast<Pair*>(memory + fixed + packed);
    s.bias = reinterpret_cast<float*>(memory + fixed + 2 * packed);
    s.key_scale = s.bias + padded;
    const int64_t blocks = (p.L + QUERIES - 1) / QUERIES;
    for (int64_t item = from; item < to; ++item) {
        const int64_t head = item / blocks, block = item % blocks;
        if (item == from || block == 0) {
            pack_keys(p, head, s);
            pack_values(p, head, s.values);
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
