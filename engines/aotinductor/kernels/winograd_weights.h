// The weights of a convolution at the points of Winograd's method, packed for its products.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "registers.h"
#include "winograd_points.h"

namespace {

// Columns [first, first + count) of all.
template <typename T>
struct Weights {
    int64_t first, count;
    Factor<T>* packed;  // strips of [36][C / DEPTH][columns of the strip][DEPTH]
    float* scales;      // [36][count]
    Factor<T>* at(int64_t column, int64_t point, int64_t width, int64_t C) const {
        return packed + POINTS * C * column + point * C * width;
    }
};

// 16 rows of `count` elements -> [count][16] in fp32.
template <typename T>
void side_by_side(const T* from, int64_t count, __m512* to) {
    constexpr int64_t PER_LANE = sizeof(float) / sizeof(T), WIDTH = LANES * PER_LANE;
    for (int64_t at = 0; at < count; at += WIDTH) {
        const int64_t lanes = std::min(LANES, (count - at) / PER_LANE);
        const __mmask16 inside = (1u << lanes) - 1;
        __m512i rows[LANES];
        for (int64_t i = 0; i < LANES; ++i) rows[i] = _mm512_maskz_loadu_epi32(inside, from + i * count + at);
        transpose(rows);
        for (int64_t i = 0; i < lanes; ++i) {
            if constexpr (PER_LANE == 2) *to++ = _mm512_castsi512_ps(_mm512_slli_epi32(rows[i], 16));
            const __m512i last = PER_LANE == 2 ? _mm512_and_si512(rows[i], _mm512_set1_epi32(0xffff0000)) : rows[i];
            *to++ = _mm512_castsi512_ps(last);
        }
    }
}

// A line of three taps as the two of a pixel's first half, or of its second.
inline void halve(const __m512 (&g)[3], bool second, __m512 (&y)[2]) {
    y[0] = second ? _mm512_add_ps(g[0], g[1]) : g[0];
    y[1] = second ? g[2] : _mm512_add_ps(g[1], g[2]);
}

// 3x3 taps, or what they are for one of four pixels, at all points.
template <int TAPS>
inline void kernel_points(const __m512* taps, bool down, bool right, __m512 (&points)[POINTS]) {
    __m512 kernel[TAPS][TAPS], lines[EDGE][TAPS];
    if constexpr (TAPS == 3) {
        UNROLL for (int i = 0; i < 9; ++i) kernel[i / 3][i % 3] = taps[i];
    } else {
        __m512 wide[2][3];
        UNROLL for (int j = 0; j < 3; ++j) {
            const __m512 column[3] = {taps[j], taps[3 + j], taps[6 + j]};
            __m512 halves[2];
            halve(column, down, halves);
            wide[0][j] = halves[0], wide[1][j] = halves[1];
        }
        UNROLL for (int i = 0; i < 2; ++i) halve(wide[i], right, kernel[i]);
    }
    UNROLL for (int j = 0; j < TAPS; ++j) {
        __m512 column[TAPS], y[EDGE];
        UNROLL for (int i = 0; i < TAPS; ++i) column[i] = kernel[i][j];
        kernel_at_points<TAPS>(column, y);
        UNROLL for (int i = 0; i < EDGE; ++i) lines[i][j] = y[i];
    }
    UNROLL for (int i = 0; i < EDGE; ++i) {
        __m512 y[EDGE];
        kernel_at_points<TAPS>(lines[i], y);
        UNROLL for (int j = 0; j < EDGE; ++j) points[i * EDGE + j] = y[j];
    }
}

// 16 columns of weights, from `column` of all, at all points.
template <typename T, int TAPS>
void transform_weights(const Problem& p, int64_t column, const Weights<T>& weights, __m512* taps) {
    const int64_t C = p.C, phase = column / p.O, own = column - weights.first;
    const int64_t strip = own / STRIP * STRIP, width = std::min(STRIP, weights.count - strip);
    const auto points_of = [&](int64_t c, __m512 (&points)[POINTS]) {
        kernel_points<TAPS>(taps + 9 * c, phase / 2, phase % 2, points);
    };
    side_by_side(static_cast<const T*>(p.weight) + column % p.O * C * 9, C * 9, taps);
    Factor<T>* to = weights.at(strip, 0, width, C) + (own - strip) * DEPTH<T>;
    __m512 points[POINTS];
    if constexpr (INTEGERS<T>) {
        __m512 squares[POINTS], most[POINTS], next[POINTS];
        for (int i = 0; i < POINTS; ++i) squares[i] = most[i] = _mm512_setzero_ps();
        for (int64_t c = 0; c < C; ++c) {
            points_of(c, points);
            for (int i = 0; i < POINTS; ++i) {
                squares[i] = _mm512_fmadd_ps(points[i], points[i], squares[i]);
                most[i] = _mm512_max_ps(most[i], _mm512_abs_ps(points[i]));
            }
        }
        for (int i = 0; i < POINTS; ++i) {
            const __m512 scale = _mm512_max_ps(times(1.0f / LARGEST_WEIGHT, most[i]),
                                               times(1.0f / WEIGHT_NORM, _mm512_sqrt_ps(squares[i])));
            const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            _mm512_storeu_ps(weights.scales + i * weights.count + own, scale);
            squares[i] = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), scale);
        }
        for (int64_t k = 0; k < C / 2; ++k, to += width * 2) {
            points_of(channel_of(k, C), points);
            points_of(channel_of(k, C) + 1, next);
            for (int i = 0; i < POINTS; ++i) {
                const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(points[i], squares[i]));
                const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(next[i], squares[i]));
                _mm512_storeu_si512(to + i * C * width,
                                    _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
            }
        }
    } else {
        for (int64_t c = 0; c < C; ++c, to += width) {
            points_of(c, points);
            for (int i = 0; i < POINTS; ++i) _mm512_storeu_ps(to + i * C * width, points[i]);
        }
    }
}

}  // namespace
