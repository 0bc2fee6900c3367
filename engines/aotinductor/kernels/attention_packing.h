// What attention.cpp works on: its operands, one thread's scratch, and how a head's keys and values lie packed in it.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

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
    int64_t neighbours() const { return int8 ? 4 : 2; }                  // that are multiplied in one
    int64_t depth() const { return head_dim / neighbours(); }            // of what is packed of a key
    int64_t blocks() const { return (S + KEYS - 1) / KEYS; }
};

struct Scratch {  // of one thread
    Pair *keys, *values;  // of the whole head: strips of [depth][strip's keys], and [keys / 2 or 4][head_dim]
    float* bias;                      // [padded], minus infinity behind the last key
    float *key_scale, *value_scale;  // of each strip; of each block of keys [head_dim]
    alignas(64) Pair q[QUERIES * LARGEST_HEAD / 2];  // per tile [depth][TILE]
    alignas(64) int8_t row[LANES * LARGEST_HEAD];    // quantised, before it is packed
    alignas(64) float scores[QUERIES * KEYS];
    alignas(64) Pair probabilities[QUERIES * KEYS / 2];
    alignas(64) float sums[QUERIES * LARGEST_HEAD];  // unnormalised output [QUERIES, head_dim]
    alignas(64) float lane_max[QUERIES * LANES];     // of a row's scores, lane by lane
    float row_max[QUERIES], row_sum[QUERIES], correction[QUERIES], q_scale[QUERIES];
    float block_scale[QUERIES];                      // of a block's int8 probabilities
    alignas(64) float dither[KEYS];                  // what is added to them before they are rounded
    int32_t q_shift[QUERIES];  // what shifted keys add to a row's sums
};

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

// Four keys' values side by side, as int8 by a scale of each channel in a block of keys: [S / 4][head_dim][4].
void pack_int8_values(const Problem& p, int64_t head, Scratch& s) {
    for (int64_t start = 0; start < p.S; start += KEYS)
        for (int64_t d = 0; d < p.head_dim; d += LANES) {
            const int64_t end = std::min(p.S, start + KEYS);
            const auto bits = [&](int64_t key) {
                return _mm256_loadu_si256((const __m256i*)(p.values.row(key, head) + d));
            };
            __m256i magnitude = _mm256_setzero_si256();  // what is no number is larger than all, as bits
            for (int64_t key = start; key < end; ++key)
                magnitude = _mm256_max_epu16(magnitude, _mm256_and_si256(bits(key), _mm256_set1_epi16(0x7fff)));
            const __m512 most = _mm512_max_ps(_mm512_set1_ps(SMALLEST), widen(magnitude));
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), most);
            _mm512_storeu_ps(s.value_scale + start / KEYS * p.head_dim + d,
                             _mm512_mul_ps(most, _mm512_set1_ps(1.0f / 127)));
            for (int64_t key = start; key < end; key += 4) {
                __m512i packed = _mm512_setzero_si512();
                for (int64_t i = 0; i < std::min<int64_t>(4, end - key); ++i) {
                    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(widen(bits(key + i)), inverse));
                    const __m512i byte = _mm512_and_si512(q, _mm512_set1_epi32(255));
                    packed = _mm512_or_si512(packed, _mm512_slli_epi32(byte, 8 * i));
                }
                _mm512_storeu_si512(s.values + key / 4 * p.head_dim + d, packed);
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

}  // namespace
