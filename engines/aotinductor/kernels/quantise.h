// bfloat16 rows as int8: what the kernels of int8 products share.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "registers.h"

namespace {

constexpr float SMALLEST = 1e-30f;  // largest magnitude of a row; smaller ones are as zeros, and have a scale still

// The largest magnitude of a row; what is no number is larger than all.
inline float largest(const uint16_t* x, int64_t count) {
    __m512i found = _mm512_setzero_si512();
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (int64_t k = 0; k < count; k += 2 * LANES) {
        const __mmask32 inside = count - k >= 2 * LANES ? ~0u : (1u << (count - k)) - 1;
        found = _mm512_max_epu16(found, _mm512_and_si512(_mm512_maskz_loadu_epi16(inside, x + k), magnitude));
    }
    const __m512i even = _mm512_slli_epi32(found, 16), odd = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), found);
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// x [count] over most / 127, to the nearest integer -> `to` [count]; their sum. No x is larger than `most`.
inline int32_t quantise(const uint16_t* x, int64_t count, float most, int8_t* to) {
    const __m512 inverse = _mm512_set1_ps(127.0f / most);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += LANES) {
        const __mmask16 inside = count - k >= LANES ? 0xffff : (1u << (count - k)) - 1;
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(inside, x + k)), inverse));
        sum = _mm512_add_epi32(sum, q);
        _mm512_mask_cvtsepi32_storeu_epi8(to + k, inside, q);
    }
    return _mm512_reduce_add_epi32(sum);
}

}  // namespace
