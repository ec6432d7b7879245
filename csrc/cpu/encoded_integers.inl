// Dot products of encoded rows with few rows of x, by whole numbers: x as 16-bit integers with a scale for every 32 of
// them, made once per call. Codes that are floats of one byte are widened, or looked up, and meet x in float32.
namespace emoe::cpu {
namespace {

// Where the parts of a narrow row lie: floats, 16-bit integers in each order, for each group a scale, a sum, and the
// sum of its first half, and the floats in another order.
inline int64_t padded_depth(int64_t depth) { return pad_up(depth, kEncodedPad); }
inline const int16_t* whole_of(const uint32_t* x, int64_t depth, Order order = kPlain) {
    return reinterpret_cast<const int16_t*>(x + padded_depth(depth)) + order * padded_depth(depth);
}
inline const float* scale_of(const uint32_t* x, int64_t depth) {
    return reinterpret_cast<const float*>(x + padded_depth(depth) + kOrders * padded_depth(depth) / 2);
}
inline const float* sum_of(const uint32_t* x, int64_t depth) {
    return scale_of(x, depth) + padded_depth(depth) / kGroup;
}
inline const float* first_of(const uint32_t* x, int64_t depth) {
    return sum_of(x, depth) + padded_depth(depth) / kGroup;
}
inline const float* turned_of(const uint32_t* x, int64_t depth) {
    return first_of(x, depth) + 2 * (padded_depth(depth) / kGroup);  // one part is free
}

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
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

// Below this a group counts as zero, since its inverse would be infinite.
constexpr float kLeast = 0x1p-100F;

// Of sixteen.
inline int sum_of_whole(__m256i values) {
    const __m256i pairs = _mm256_madd_epi16(values, _mm256_set1_epi16(1));
    __m128i two = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0x4E));
    two = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1));
    return _mm_cvtsi128_si32(two);
}

// What is of even place into the first, of odd place into the second.
inline void take_apart(__m256i (&both)[2]) {
    __m256i made[2];
    for (int i = 0; i < 2; ++i) {  // in 32 bits no value saturates
        const auto half = [&](__m256i pairs) {
            return i == 1 ? _mm256_srai_epi32(pairs, 16) : _mm256_srai_epi32(_mm256_slli_epi32(pairs, 16), 16);
        };
        made[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(half(both[0]), half(both[1])), 0xD8);
    }
    both[0] = made[0];
    both[1] = made[1];
}

#if defined(EMOE_QUADS)
// Group g, given what is of even place and of odd place in it, in the orders that meet four groups at once.
inline void store_quads(uint32_t* x, int64_t depth, int64_t g, const __m256i (&apart)[2]) {
    const auto part_of = [&](Order order, int64_t part) {
        return const_cast<int16_t*>(whole_of(x, depth, order)) + (g / 4 * 4 + part) * kGroup;
    };
    const auto store_eight = [&](Order order, int64_t part, __m128i eight) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(part_of(order, part) + g % 4 * 8), eight);
    };
    __m256i again[2] = {apart[0], apart[1]};
    take_apart(again);
    for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(part_of(kPairOrder, g % 2 * 2 + i) + g % 4 / 2 * 16), apart[i]);
        store_eight(kHalfOrder, i, _mm256_castsi256_si128(apart[i]));
        store_eight(kHalfOrder, 2 + i, _mm256_extracti128_si256(apart[i], 1));
        store_eight(kNibbleOrder, i, _mm256_castsi256_si128(again[i]));
        store_eight(kNibbleOrder, 2 + i, _mm256_extracti128_si256(again[i], 1));
    }
}
#endif

// Groups [g0, g1) of a narrow row whose floats are there.
inline void quantize(uint32_t* x, int64_t depth, int64_t g0, int64_t g1) {
    auto* whole = const_cast<int16_t*>(whole_of(x, depth));
    auto* apart = const_cast<int16_t*>(whole_of(x, depth, kApartOrder));
    auto* scale = const_cast<float*>(scale_of(x, depth));
    auto* sum = const_cast<float*>(sum_of(x, depth));
    auto* first = const_cast<float*>(first_of(x, depth));
    const __m256i size = _mm256_set1_epi32(0x7FFFFFFF);
    for (int64_t g = g0; g < g1; ++g) {
        const float* from = reinterpret_cast<const float*>(x) + g * kGroup;
        __m256 part[4];
        __m256i most = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {  // as integers, so that infinity and NaN are the largest
            part[i] = load8(from + 8 * i);
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(part[i]), size));
        }
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
        const uint32_t bits = (uint32_t)_mm_cvtsi128_si32(four);
        const bool usual = bits < 0x7F800000U && float_of(bits) >= kLeast;
        const float inverse = usual ? 32767.0F / float_of(bits) : 0.0F;
        scale[g] = usual ? float_of(bits) / 32767.0F : bits < 0x7F800000U ? 0.0F : float_of(0x7FC00000U);
        const __m256 by = _mm256_set1_ps(inverse);
        __m256i rounded[4];
        for (int i = 0; i < 4; ++i) {
            const __m256 value = usual ? _mm256_mul_ps(part[i], by) : _mm256_setzero_ps();
            rounded[i] = _mm256_cvtps_epi32(value);
        }
        float total[2];
        __m256i both[2];
        for (int i = 0; i < 2; ++i) {
            const __m256i packed =
                _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded[2 * i], rounded[2 * i + 1]), 0xD8);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole + g * kGroup + 16 * i), packed);
            both[i] = packed;
            total[i] = (float)sum_of_whole(packed);
        }
        take_apart(both);
        for (int i = 0; i < 2; ++i) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(apart + g * kGroup + 16 * i), both[i]);
        }
#if defined(EMOE_QUADS)
        store_quads(x, depth, g, both);
#endif
        sum[g] = scale[g] * (total[0] + total[1]);
        first[g] = scale[g] * total[0];
    }
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

template <class Q, int M, int R>
inline void float_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
    constexpr int kParts = kGroup / L;
    const int64_t stride = encoded_stride(a.w.depth);
    const int64_t groups = a.w.depth / kGroup;
    const int64_t ahead_by = ahead_of(R * a.w.depth * a.w.step);
    const auto* floats = reinterpret_cast<const float*>(x);
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
        for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                V values[kParts];
                Q::values(row[r], g0 + j, values);
                const V scale = vset(t[r][j]);
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

#if defined(EMOE_BYTE_TABLES)
template <class Q>
constexpr bool kByTable = [] {
    if constexpr (requires { Q::kLooksUp; }) return Q::kLooksUp;
    return false;
}();

// The floats of groups [g0, g1) of a narrow row in the order of look_up_e4m3.
inline void turn(uint32_t* x, int64_t depth, int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g) {
        const float* from = reinterpret_cast<const float*>(x) + g * kGroup;
        float* to = const_cast<float*>(turned_of(x, depth)) + g / 2 * 64 + g % 2 * 8;
        const auto both = [](__m256 turned) {
            return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(turned), 0xD8));
        };
        for (int i = 0; i < 2; ++i) {
            const __m256 one = load8(from + 8 * i);
            const __m256 other = load8(from + 16 + 8 * i);
            _mm256_storeu_ps(to + 32 * i, both(_mm256_shuffle_ps(one, other, 0x88)));
            _mm256_storeu_ps(to + 32 * i + 16, both(_mm256_shuffle_ps(one, other, 0xDD)));
        }
    }
}

// As float_tile, two groups at a time.
template <class Q, int M, int R>
inline void table_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
    const int64_t depth = a.w.depth;
    const int64_t stride = encoded_stride(depth);
    const int64_t groups = depth / kGroup;
    const int64_t ahead_by = ahead_of(R * depth * a.w.step);
    const float* turned = turned_of(x, depth);
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
        __m512 t[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const unsigned char* ahead = row[r].codes + g0 * kGroup + ahead_by;
            for (int64_t b = 0; b < Q::kLine; b += 64) __builtin_prefetch(ahead + b, 0, 2);
            t[r] = _mm512_castps256_ps512(Q::scales(a, row[r], g0, n).scale[0]);
        }
        const auto two = [&]<int q>() __attribute__((always_inline)) {
            if (2 * q >= n) return;
            const __mmask64 there = 2 * q + 1 < n ? ~0ULL : 0xFFFFFFFFULL;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                V values[4];
                look_up_e4m3(_mm512_maskz_loadu_epi8(there, row[r].codes + (g0 + 2 * q) * kGroup), values);
                const V scale = {scales_of_two<q>(t[r])};
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const float* with = turned + m * stride + (g0 + 2 * q) * kGroup;
                    V sum = vmul(values[0], vload(with));
#pragma GCC unroll 3
                    for (int i = 1; i < 4; ++i) sum = vfma(values[i], vload(with + i * L), sum);
                    acc[m][r] = vfma(sum, scale, acc[m][r]);
                }
            }
        };
        two.template operator()<0>();
        two.template operator()<1>();
        two.template operator()<2>();
        two.template operator()<3>();
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < least(R, count); ++r) y[m * kNarrowBlock + r] = vsum(acc[m][r]);
    }
}
#endif

template <class Q, int M, int R>
inline void row_tile(const Source& a, int64_t first, int64_t count, const uint32_t* x, float* y) {
#if defined(EMOE_BYTE_TABLES)
    if constexpr (kByTable<Q>) return table_tile<Q, M, R>(a, first, count, x, y);
#endif
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
