// What all kernels do with registers of AVX-512, whatever they compute.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

// Compilers keep a tile in registers only where its loops are unrolled, which -O2 does not.
#define UNROLL _Pragma("GCC unroll 8")

namespace {

constexpr int64_t LANES = 16;               // 32-bit values of a register
constexpr int64_t WORTH_THREADS = 1 << 18;  // products below which waking other threads costs more

inline __m512 widen(__m256i bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16), 16));
}

// To the nearest bfloat16, ties to even. AVX512-BF16 would do it in one, but not every CPU with VNNI has it.
inline __m256i narrow(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i high = _mm512_srli_epi32(rounded, 16);
    const __mmask16 no_number = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, no_number, _mm512_set1_epi32(0x7fc0)));
}

// In place: lane j of row i <-> lane i of row j.
inline void transpose(__m512i (&r)[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int half = 0; half < 16; half += 8)
        for (int i = 0; i < 4; ++i) {
            t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
            t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Calls f with n, or with MOST where n is larger, as a constant: tiles of every size are loops that unroll.
template <int MOST, typename F>
void with_constant(int64_t n, const F& f) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_constant<MOST - 1>(n, f);
    f(std::integral_constant<int, MOST>());
}

}  // namespace
