// What winograd.cpp works on: the problem, its numbers, and lines of pixels and of kernels at the points.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "registers.h"

namespace {

constexpr int COLUMNS = 4;            // registers of a strip
constexpr int64_t STRIP = COLUMNS * LANES;
constexpr int EDGE = 6, POINTS = EDGE * EDGE;
constexpr float PATCH_NORM = 32700.0f, WEIGHT_NORM = 64000.0f, LARGEST_WEIGHT = 32700.0f;

// Points 0, A, -A, B, -B and infinity; at them a decoder's error was smallest.
constexpr float A = 0.75f, B = 1.5f, AA = A * A, BB = B * B;

using Bits = uint16_t;  // bfloat16

template <typename T>
using Factor = std::conditional_t<std::is_same_v<T, float>, float, int16_t>;  // what is multiplied
template <typename T>
constexpr bool INTEGERS = !std::is_same_v<T, float>;
template <typename T>
constexpr int64_t DEPTH = INTEGERS<T> ? 2 : 1;  // neighbours along the channels of a lane

struct Problem {
    const void* x;         // [N, H, W, C]
    const void* weight;    // [O, C, 3, 3]
    const void* bias;      // [O] or null
    const void* residual;  // like out, or null
    void* out;             // [N, OUT_H, OUT_W, O]
    int64_t N, H, W, C, O;
    int64_t top, left;  // padding, on the other side too
    bool enlarges;
    int taps() const { return enlarges ? 2 : 3; }
    int64_t tile() const { return EDGE + 1 - taps(); }
    int64_t columns() const { return enlarges ? 4 * O : O; }
    int64_t height() const { return H + 2 * top + 1 - taps(); }  // of the convolution before pixels are interleaved
    int64_t width() const { return W + 2 * left + 1 - taps(); }
    int64_t down() const { return (height() + tile() - 1) / tile(); }
    int64_t across() const { return (width() + tile() - 1) / tile(); }
    int64_t out_height() const { return enlarges ? 2 * H : height(); }
    int64_t out_width() const { return enlarges ? 2 * W : width(); }
    int64_t patches() const { return N * down() * across(); }
};

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load(const Bits* from) {
    return widen(_mm256_loadu_si256((const __m256i*)from));
}

inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

inline void store(Bits* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

inline __m512 times(float factor, __m512 x) { return _mm512_mul_ps(_mm512_set1_ps(factor), x); }
inline __m512 plus(__m512 sum, float factor, __m512 x) { return _mm512_fmadd_ps(_mm512_set1_ps(factor), x, sum); }

// Pixels of a line -> points.
inline void at_points(const __m512 (&x)[EDGE], __m512 (&y)[EDGE]) {
    y[0] = plus(plus(times(AA * BB, x[0]), -(AA + BB), x[2]), 1.0f, x[4]);
    y[5] = plus(plus(times(AA * BB, x[1]), -(AA + BB), x[3]), 1.0f, x[5]);
    const __m512 even_a = plus(x[4], -BB, x[2]), odd_a = plus(x[3], -BB, x[1]);
    const __m512 even_b = plus(x[4], -AA, x[2]), odd_b = plus(x[3], -AA, x[1]);
    y[1] = plus(even_a, A, odd_a);
    y[2] = plus(even_a, -A, odd_a);
    y[3] = plus(even_b, B, odd_b);
    y[4] = plus(even_b, -B, odd_b);
}

// Taps of a line of the kernel -> points.
template <int TAPS>
void kernel_at_points(const __m512 (&g)[TAPS], __m512 (&y)[EDGE]) {
    constexpr float OF_A = 1.0f / (2 * AA * (AA - BB)), OF_B = 1.0f / (2 * BB * (BB - AA));
    __m512 even_a = g[0], even_b = g[0];
    if constexpr (TAPS == 3) even_a = plus(g[0], AA, g[2]), even_b = plus(g[0], BB, g[2]);
    y[0] = times(1.0f / (AA * BB), g[0]);
    y[1] = times(OF_A, plus(even_a, A, g[1]));
    y[2] = times(OF_A, plus(even_a, -A, g[1]));
    y[3] = times(OF_B, plus(even_b, B, g[1]));
    y[4] = times(OF_B, plus(even_b, -B, g[1]));
    y[5] = g[TAPS - 1];
}

// Points -> results of a line.
template <int TILE>
void from_points(const __m512 (&y)[EDGE], __m512 (&z)[TILE]) {
    const __m512 sum_a = _mm512_add_ps(y[1], y[2]), less_a = _mm512_sub_ps(y[1], y[2]);
    const __m512 sum_b = _mm512_add_ps(y[3], y[4]), less_b = _mm512_sub_ps(y[3], y[4]);
    z[0] = _mm512_add_ps(y[0], _mm512_add_ps(sum_a, sum_b));
    z[1] = plus(times(A, less_a), B, less_b);
    z[2] = plus(times(AA, sum_a), BB, sum_b);
    z[3] = plus(times(AA * A, less_a), BB * B, less_b);
    if constexpr (TILE == 5) z[4] = plus(times(AA * AA, sum_a), BB * BB, sum_b);
    z[TILE - 1] = _mm512_add_ps(z[TILE - 1], y[5]);
}

// Sums of the lanes of four registers, side by side.
inline __m128 sums(const __m512* x) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Integers of 32 channels lie as _mm512_packs_epi32 leaves them: the pair at `k` begins with this channel.
inline int64_t channel_of(int64_t k, int64_t C) {
    const int64_t first = k / LANES * 2 * LANES, own = k % LANES;
    if (first + 2 * LANES > C) return 2 * k;
    return first + own / 4 * 4 + own % 2 * 2 + (own % 4 >= 2 ? LANES : 0);
}

}  // namespace
