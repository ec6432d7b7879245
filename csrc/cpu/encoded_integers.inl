// Dot products of encoded rows with few rows of x (encoded_x.inl), by whole numbers; codes that are floats of one byte
// are widened, or looked up, and meet x in float32.
namespace emoe::cpu {
namespace {

// The sums of R rows to y[0..least(R, count)). A row's is added in the same order whatever R is.
template <int R>
inline void store_sums(const __m256 (&rows)[R], int64_t count, float* y) {
    static_assert(R == 1 || R == 2 || R == 4);
    __m256 pairs = _mm256_hadd_ps(rows[0], rows[R == 1 ? 0 : 1]);
    pairs = _mm256_hadd_ps(pairs, R == 4 ? _mm256_hadd_ps(rows[R == 4 ? 2 : 0], rows[R - 1]) : pairs);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    float each[4];
    _mm_storeu_ps(each, sums);
    for (int r = 0; r < least(R, count); ++r) y[r] = each[r];
}

#if defined(EMOE_QUADS)
// Narrow rows in one order, their parts `stride` units apart.
struct Narrow {
    const int16_t* whole;
    const float* scale;
    const float* sum;
    const float* first;
    int64_t stride;
};

// acc[m][r] += a step of eight groups, four of them at a time.
template <class Q, int M, int R>
inline void quad_step(const Source& a, const RowAt (&row)[R], int64_t g0, const Narrow& x, int64_t ahead_by,
                      V (&acc)[M][R], __m256 (&low)[M][R]) {
    constexpr int S = Q::kScales;
    const int64_t stride = x.stride;
    const int16_t* whole = x.whole + g0 * kGroup;
    const float* x_scale = x.scale + g0;
    const float* x_sum = x.sum + g0;
    const float* x_first = x.first + g0;
    __m512 its_scale[M];  // eight, or each twice
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const __m256 eight = _mm256_mul_ps(load8(x_scale + m * stride), Q::quad_factor());
        its_scale[m] = _mm512_castps256_ps512(eight);
        if constexpr (S == 2) {
            const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            its_scale[m] = _mm512_permutexvar_ps(twice, its_scale[m]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const unsigned char* ahead = row[r].codes + g0 / kGroups * Q::kLine + ahead_by;
        for (int64_t b = 0; b < Q::kLine; b += 64) __builtin_prefetch(ahead + b, 0, 2);
        const auto scales = Q::scales(a, row[r], g0, kGroups);
        __m512 t[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512 both = _mm512_castps256_ps512(scales.scale[0]);
            if constexpr (S == 2) both = _mm512_insertf32x8(both, scales.scale[1], 1);
            t[m] = _mm512_mul_ps(both, its_scale[m]);
            if constexpr (Q::kMinimum) {
                low[m][r] = _mm256_fmadd_ps(scales.minimum, load8(x_sum + m * stride), low[m][r]);
            }
            if constexpr (kHalfMinima<Q>) {
                low[m][r] = _mm256_fmadd_ps(scales.first, load8(x_first + m * stride), low[m][r]);
            }
        }
        const auto quad = [&]<int q>() __attribute__((always_inline)) {
            __m512i parts[4];
            Q::template quad<q>(row[r], g0 + 4 * q, parts);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const int16_t* with = whole + m * 2 * stride + 4 * q * kGroup;
                acc[m][r] = add_quad<S, Q::kOrder == kPairOrder, q>(acc[m][r], parts, with, t[m]);
            }
        };
        quad.template operator()<0>();
        quad.template operator()<1>();
    }
}
#endif

// y[m][r] of R rows of weights and M rows of x; where fewer are left the last stands for those after it.
template <class Q, int M, int R>
inline void integer_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
    constexpr int S = Q::kScales;
    const int64_t depth = a.w.depth;
    const int64_t stride = encoded_stride(depth);
    const int64_t groups = depth / kGroup;
    const int16_t* whole = whole_of(x, depth, Q::kApart ? kApartOrder : kPlain);
    const float* x_scale = scale_of(x, depth);
    const float* x_sum = sum_of(x, depth);
    const float* x_first = first_of(x, depth);
    const int64_t ahead_by = ahead_of(R * (depth / kGroup) * (Q::kLine / kGroups) * a.w.step);
#if defined(EMOE_QUADS)
    constexpr Order kOrder = [] {
        if constexpr (requires { Q::kOrder; }) return Q::kOrder;
        return kPlain;
    }();
    const Narrow quads{whole_of(x, depth, kOrder), x_scale, x_sum, x_first, stride};
#endif
    RowAt row[R];
    V acc[M][R];
    __m256 low[M][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        row[r] = Q::row(a, first + least(r, count - 1));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            acc[m][r] = vzero();
            low[m][r] = _mm256_setzero_ps();
        }
    }
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
        const int64_t n = least(kGroups, groups - g0);
#if defined(EMOE_QUADS)
        if constexpr (requires { Q::kOrder; }) {
            if (Q::kStep || n == kGroups) {
                quad_step<Q, M, R>(a, row, g0, quads, ahead_by, acc, low);
                continue;
            }
        }
#endif
        alignas(64) float t[R][M][kGroups * S];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const unsigned char* ahead = row[r].codes + g0 / kGroups * Q::kLine + ahead_by;
            for (int64_t b = 0; b < Q::kLine; b += 64) __builtin_prefetch(ahead + b, 0, 2);
            const auto scales = Q::scales(a, row[r], g0, n);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m256 its_scale = load8(x_scale + m * stride + g0);
                if constexpr (S == 2) {
                    const __m256i first_half = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
                    const __m256i second_half = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
                    const __m256 ones = _mm256_permutevar8x32_ps(its_scale, first_half);
                    const __m256 others = _mm256_permutevar8x32_ps(its_scale, second_half);
                    _mm256_store_ps(t[r][m], _mm256_mul_ps(scales.scale[0], ones));
                    _mm256_store_ps(t[r][m] + kGroups, _mm256_mul_ps(scales.scale[1], others));
                } else {
                    _mm256_store_ps(t[r][m], _mm256_mul_ps(scales.scale[0], its_scale));
                }
                if constexpr (Q::kMinimum) {
                    low[m][r] = _mm256_fmadd_ps(scales.minimum, load8(x_sum + m * stride + g0), low[m][r]);
                }
                if constexpr (kHalfMinima<Q>) {
                    low[m][r] = _mm256_fmadd_ps(scales.first, load8(x_first + m * stride + g0), low[m][r]);
                }
            }
        }
        // Kept in memory, so that one of them is broadcast by a load and not by the port that widens codes.
        __asm__ volatile("" : "+m"(t));
        const auto group = [&]<int j>(int64_t at) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Codes32 codes = Q::template codes<j>(row[r], g0 + at);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    acc[m][r] = add_dot<S, Q::kApart>(acc[m][r], codes, whole + m * 2 * stride + (g0 + at) * kGroup,
                                                      t[r][m] + at * S);
                }
            }
        };
        if (Q::kStep || n == kGroups) {
            group.template operator()<0>(0);
            group.template operator()<1>(1);
            group.template operator()<2>(2);
            group.template operator()<3>(3);
            group.template operator()<4>(4);
            group.template operator()<5>(5);
            group.template operator()<6>(6);
            group.template operator()<7>(7);
        } else {
            for (int64_t j = 0; j < n; ++j) group.template operator()<0>(j);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        __m256 sums[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            sums[r] = halved(acc[m][r]);
            if constexpr (Q::kMinimum) sums[r] = _mm256_add_ps(sums[r], low[m][r]);
        }
        store_sums<R>(sums, count, y + m * kNarrowBlock);
    }
}

// Whether floats of weights come two groups at a time, in the order of turned rows.
template <class Q>
constexpr bool kTurned = requires { &Q::turned; };

template <class Q, int M, int R>
inline void float_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
    constexpr int kTaken = kTurned<Q> ? 2 : 1;  // groups at once
    constexpr int kParts = kTaken * kGroup / L;
    const int64_t depth = a.w.depth;
    const int64_t stride = encoded_stride(depth);
    const int64_t groups = depth / kGroup;
    const int64_t ahead_by = ahead_of(R * depth * a.w.step);
    const float* floats = kTurned<Q> ? turned_of(x, depth) : reinterpret_cast<const float*>(x);
    RowAt row[R];
    V acc[M][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        row[r] = Q::row(a, first + least(r, count - 1));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][r] = vzero();
    }
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
        const int64_t n = least(kGroups, groups - g0);
        alignas(64) float t[R][kGroups];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const unsigned char* ahead = row[r].codes + g0 * kGroup + ahead_by;
            for (int64_t b = 0; b < Q::kLine; b += 64) __builtin_prefetch(ahead + b, 0, 2);
            _mm256_store_ps(t[r], Q::scales(a, row[r], g0, n).scale[0]);
        }
        for (int64_t j = 0; j < n; j += kTaken) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                V values[kParts];
                V scale;
                if constexpr (kTurned<Q>) {
                    Q::turned(row[r], g0 + j, j + 1 < n, values);
                    scale = Q::scale_of_two(t[r] + j);
                } else {
                    Q::values(row[r], g0 + j, values);
                    scale = vset(t[r][j]);
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const float* with = floats + m * stride + (g0 + j) * kGroup;
                    V sum = vmul(values[0], vload(with));
#pragma GCC unroll 4
                    for (int i = 1; i < kParts; ++i) sum = vfma(values[i], vload(with + i * L), sum);
                    acc[m][r] = vfma(sum, scale, acc[m][r]);
                }
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < least(R, count); ++r) y[m * kNarrowBlock + r] = vsum(acc[m][r]);
    }
}

template <class Q, int M, int R>
inline void row_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
    if constexpr (requires { &Q::values; }) {
        float_tile<Q, M, R>(a, first, count, x, y);
    } else {
        integer_tile<Q, M, R>(a, first, count, x, y);
    }
}

// y [rows][kNarrowBlock]
template <class Q>
void tiled_rows(const Source& a, int64_t first, int64_t count, int rows, const uint32_t* x, float* y) {
    constexpr int kTogether = 4;
    const int64_t stride = encoded_stride(a.w.depth);
    for (int64_t r = 0; r < count; r += kTogether) {
        int m = 0;
        if constexpr (kManyRegisters) {
            for (; m + 8 <= rows; m += 8) {
                for (int64_t i = r; i < least(count, r + kTogether); ++i) {
                    row_tile<Q, 8, 1>(a, first + i, count - i, x + m * stride, y + m * kNarrowBlock + i);
                }
            }
        }
        for (; m + 4 <= rows; m += 4) {
            for (int64_t i = r; i < least(count, r + kTogether); i += 2) {
                row_tile<Q, 4, 2>(a, first + i, count - i, x + m * stride, y + m * kNarrowBlock + i);
            }
        }
        for (; m < rows; ++m) {
            row_tile<Q, 1, kTogether>(a, first + r, count - r, x + m * stride, y + m * kNarrowBlock + r);
        }
    }
}

}  // namespace
}  // namespace emoe::cpu
