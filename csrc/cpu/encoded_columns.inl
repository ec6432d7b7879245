// Dot products of AWQ and GPTQ words with few rows of x: a word holds eight outputs of an input, or eight inputs of an
// output, so sums lie along the outputs. 32 inputs are multiplied as whole numbers, as in encoded_integers.inl.
namespace emoe::cpu {
namespace {

// Eight outputs are neighbours in every plane.
inline bool columns_of_words(const Weights& w) { return w.step == 1 && w.first % 8 == 0 && w.count % 8 == 0; }

// part[m][...] of the inputs that share scales.
struct ColumnSums {
    alignas(64) float part[kNarrowRows][kNarrowBlock];
    float sum[kNarrowRows];  // of x
};

// Where outputs 0 to 7 of a word lie in it.
inline __m256i word_shifts(bool awq) {
    return awq ? _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
}
// The scales of outputs [at, at + 8) in a weight group, and their zeros.
inline __m256 group_scales(const Source& a, int64_t group, int64_t at, __m256& zeros) {
    int word;
    __builtin_memcpy(&word, a.slot + a.w.zeros + (group * (a.w.rows / 8) + at / 8) * 4, 4);
    const __m256i spread = _mm256_srlv_epi32(_mm256_set1_epi32(word), word_shifts(a.w.codes == Codes::kAwq));
    __m256i zero = _mm256_and_si256(spread, _mm256_set1_epi32(15));
    if (a.w.codes == Codes::kGptq) zero = _mm256_add_epi32(zero, _mm256_set1_epi32(1));  // stored less one
    zeros = _mm256_cvtepi32_ps(zero);
    return eight_scales(a.w.scale, a.slot + a.w.scales + (group * a.w.rows + at) * scale_size(a.w.scale));
}
// y += scale * (part - zero * sum) for outputs [at, at + 8) of the matrix, of weight group `group`.
inline void add_scaled(const Source& a, int64_t group, int64_t at, __m256 part, float sum, float* y) {
    __m256 zeros;
    const __m256 scale = group_scales(a, group, at, zeros);
    const __m256 value = _mm256_fnmadd_ps(zeros, _mm256_set1_ps(sum), part);
    _mm256_storeu_ps(y, _mm256_fmadd_ps(scale, value, _mm256_loadu_ps(y)));
}

// Inputs of group g times outputs [0, count) from `at` on, added to the parts of each row.
inline void gptq_group(const Source& a, int64_t at, int64_t count, int64_t g, int rows, const uint32_t* x,
                       ColumnSums& sums) {
    const int64_t stride = encoded_stride(a.w.depth);
    const int64_t line = a.w.rows * 4;
    const unsigned char* words = a.slot + a.w.data + g * 4 * line + at * 4;
    const int16_t* whole = whole_of(x, a.w.depth) + g * kGroup;
    const float* scale = scale_of(x, a.w.depth) + g;
    alignas(16) int pairs[kNarrowRows][16];  // inputs i and i + 4 of a word
    for (int m = 0; m < rows; ++m) {
        for (int w = 0; w < 4; ++w) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(whole + m * 2 * stride + w * 8));
            const __m128i made = _mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(pairs[m] + 4 * w), made);
        }
    }
    const __m256i nibbles = _mm256_set1_epi32(0x000F000F);
    for (int64_t c = 0; c < count; c += 8) {
        const unsigned char* p = words + c * 4;
        if (c % 16 == 0) {
            for (int w = 0; w < 4; ++w) __builtin_prefetch(p + (4 + w) * line, 0, 3);
        }
        __m256i word[4];
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) word[w] = load_bytes32(p + w * line);
        for (int m = 0; m < rows; ++m) {
            __m256i acc = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word[w], 4 * i), nibbles);
                    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(code, _mm256_set1_epi32(pairs[m][4 * w + i])));
                }
            }
            float* part = sums.part[m] + c;
            const __m256 value =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_set1_ps(scale[m * stride]), load8(part));
            _mm256_store_ps(part, value);
        }
    }
}

// As gptq_group; part[m][64 b + 8 p + j] is output 64 b + 8 j + kOutput[p] there.
inline void awq_group(const Source& a, int64_t at, int64_t count, int64_t g, int rows, const uint32_t* x,
                      ColumnSums& sums) {
    const int64_t stride = encoded_stride(a.w.depth);
    const int64_t line = a.w.rows / 8 * 4;
    const unsigned char* words = a.slot + a.w.data + g * kGroup * line + at / 8 * 4;
    const int16_t* whole = whole_of(x, a.w.depth) + g * kGroup;
    const float* scale = scale_of(x, a.w.depth) + g;
    const __m256i nibbles = _mm256_set1_epi32(0x000F000F);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    constexpr int64_t kAhead = 2 * kGroup;
    for (int64_t c = 0; c < count; c += 64) {
        const unsigned char* p = words + c / 8 * 4;
        const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)((count - c) / 8)), lanes);
        const auto load = [&](int64_t k) {
            return _mm256_maskload_epi32(reinterpret_cast<const int*>(p + k * line), valid);
        };
        for (int m = 0; m < rows; ++m) {
            __m256i acc[8];
            for (__m256i& each : acc) each = _mm256_setzero_si256();
            for (int64_t k = 0; k < kGroup; k += 2) {
                if (c == 0 && m == 0) {  // a few at a time: what an input has here is too short a run to be foreseen
                    for (int64_t b = 0; b < count / 2; b += 64) {
                        __builtin_prefetch(p + (kAhead + k) * line + b, 0, 2);
                        __builtin_prefetch(p + (kAhead + k + 1) * line + b, 0, 2);
                    }
                }
                const __m256i first = load(k);
                const __m256i second = load(k + 1);
                const __m256i low = _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xAA);
                const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xAA);
                int pair;
                __builtin_memcpy(&pair, whole + m * 2 * stride + k, 4);
                const __m256i with = _mm256_set1_epi32(pair);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(i < 4 ? low : high, i % 4 * 4), nibbles);
                    acc[i] = _mm256_add_epi32(acc[i], _mm256_madd_epi16(code, with));
                }
            }
            float* part = sums.part[m] + c;
            const __m256 by = _mm256_set1_ps(scale[m * stride]);
            for (int i = 0; i < 8; ++i) {
                _mm256_store_ps(part + 8 * i, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i]), by, load8(part + 8 * i)));
            }
        }
    }
}

template <bool kAwq>
void column_rows(const Source& a, int64_t first, int64_t count, int rows, const uint32_t* x, float* y) {
    static constexpr int kPlace[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of outputs 0 to 7 of a word of AWQ
    const int64_t stride = encoded_stride(a.w.depth);
    const int64_t groups = a.w.depth / kGroup;
    const int64_t per = a.w.scale_cols == 0 ? groups : a.w.scale_cols / kGroup;
    const int64_t at = a.w.first + first;
    ColumnSums sums;
    for (int m = 0; m < rows; ++m) {
        for (int64_t c = 0; c < count; ++c) y[m * kNarrowBlock + c] = 0.0F;
    }
    for (int64_t g0 = 0; g0 < groups; g0 += per) {
        for (int m = 0; m < rows; ++m) {
            sums.sum[m] = 0.0F;
            for (int64_t c = 0; c < pad_up(count, 64); c += 8) _mm256_store_ps(sums.part[m] + c, _mm256_setzero_ps());
        }
        for (int64_t g = g0; g < g0 + per; ++g) {
            (kAwq ? awq_group : gptq_group)(a, at, count, g, rows, x, sums);
            for (int m = 0; m < rows; ++m) sums.sum[m] += sum_of(x + m * stride, a.w.depth)[g];
        }
        for (int m = 0; m < rows; ++m) {
            for (int64_t c = 0; c < count; c += 8) {
                __m256 part = load8(sums.part[m] + c);
                if constexpr (kAwq) {
                    const float* from = sums.part[m] + c / 64 * 64 + c / 8 % 8;
                    const auto of = [&](int i) { return from[8 * kPlace[i]]; };
                    part = _mm256_setr_ps(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
                }
                add_scaled(a, g0 / per, at + c, part, sums.sum[m], y + m * kNarrowBlock + c);
            }
        }
    }
}
void awq_rows(const Source& a, int64_t first, int64_t count, int rows, const uint32_t* x, float* y) {
    column_rows<true>(a, first, count, rows, x, y);
}
void gptq_rows(const Source& a, int64_t first, int64_t count, int rows, const uint32_t* x, float* y) {
    column_rows<false>(a, first, count, rows, x, y);
}

}  // namespace
}  // namespace emoe::cpu
