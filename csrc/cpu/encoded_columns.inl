// Dot products of AWQ and GPTQ words with few rows of x: a word holds eight outputs of an input, or eight inputs of an
// output, so sums lie along the outputs. 32 inputs are multiplied as whole numbers, as in encoded_integers.inl.
namespace emoe::cpu {
namespace {

// Eight outputs are neighbours in every plane.
inline bool columns_of_words(const Weights& w) { return w.step == 1 && w.first % 8 == 0 && w.count % 8 == 0; }

constexpr int64_t kWordsAhead = kGroup;  // inputs

// part[m][...] of the inputs that share scales.
struct ColumnSums {
    alignas(64) float part[kMostEncoded][kNarrowBlock];
    float sum[kMostEncoded];  // of x
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
    alignas(16) int pairs[kMostEncoded][16];  // inputs i and i + 4 of a word
    for (int m = 0; m < rows; ++m) {
        for (int w = 0; w < 4; ++w) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(whole + m * 2 * stride + w * 8));
            const __m128i made = _mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(pairs[m] + 4 * w), made);
        }
    }
    const Words once = word_set(0x000F000F);
    const Words large = word_set(0x00F000F0);
    for (int64_t c = 0; c < count; c += L) {
        const unsigned char* p = words + c * 4;
        if (c % 16 == 0) {
            for (int w = 0; w < 4; ++w) __builtin_prefetch(p + (kWordsAhead / 8 + w) * line, 0, 2);
        }
        Words word[4];
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) word[w] = word_load(p + w * line, count - c);
        for (int m = 0; m < rows; ++m) {
            Words sum = word_set(0);
            Words larger = word_set(0);  // 16 times too large
#pragma GCC unroll 4
            for (int w = 0; w < 4; ++w) {
                const int* with = pairs[m] + 4 * w;
                const Words rest = word_right<8>(word[w]);
                sum = word_dot(sum, word_and(word[w], once), with[0]);
                larger = word_dot(larger, word_and(word[w], large), with[1]);
                sum = word_dot(sum, word_and(rest, once), with[2]);
                larger = word_dot(larger, word_and(rest, large), with[3]);
            }
            float* part = sums.part[m] + c;
            const V value = word_floats(word_add(sum, word_right_signed<4>(larger)));
            vstore(part, vfma(value, vset(scale[m * stride]), vload(part)));
        }
    }
}

constexpr int64_t kAwqBlock = 8 * L;  // outputs that L words of AWQ hold

// As gptq_group; part[m][b + L p + j], b a multiple of kAwqBlock, is output b + 8 j + kOutput[p] there.
inline void awq_group(const Source& a, int64_t at, int64_t count, int64_t g, int rows, const uint32_t* x,
                      ColumnSums& sums) {
    const int64_t stride = encoded_stride(a.w.depth);
    const int64_t line = a.w.rows / 8 * 4;
    const unsigned char* words = a.slot + a.w.data + g * kGroup * line + at / 8 * 4;
    const int16_t* whole = whole_of(x, a.w.depth) + g * kGroup;
    const float* scale = scale_of(x, a.w.depth) + g;
    const Words once = word_set(0x000F000F);
    const Words large = word_set(0x00F000F0);
    for (int64_t c = 0; c < count; c += kAwqBlock) {
        const unsigned char* p = words + c / 8 * 4;
        const bool new_line = c % 128 == 0;  // what an input has here is too short a run to be foreseen
        for (int m = 0; m < rows; ++m) {
            Words acc[8];
            for (Words& each : acc) each = word_set(0);
            for (int64_t k = 0; k < kGroup; k += 2) {
                if (new_line && m == 0) {
                    __builtin_prefetch(p + (kWordsAhead + k) * line, 0, 2);
                    __builtin_prefetch(p + (kWordsAhead + k + 1) * line, 0, 2);
                }
                const Words first = word_load(p + k * line, (count - c) / 8);
                const Words second = word_load(p + (k + 1) * line, (count - c) / 8);
                const Words half[2] = {word_mix(first, word_left<16>(second)), word_mix(word_right<16>(first), second)};
                int pair;
                __builtin_memcpy(&pair, whole + m * 2 * stride + k, 4);
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    const Words rest = word_right<8>(half[h]);
                    acc[4 * h] = word_dot(acc[4 * h], word_and(half[h], once), pair);
                    acc[4 * h + 1] = word_dot(acc[4 * h + 1], word_and(half[h], large), pair);
                    acc[4 * h + 2] = word_dot(acc[4 * h + 2], word_and(rest, once), pair);
                    acc[4 * h + 3] = word_dot(acc[4 * h + 3], word_and(rest, large), pair);
                }
            }
            float* part = sums.part[m] + c;
            for (int i = 0; i < 8; ++i) {
                const V by = vset(scale[m * stride] * (i % 2 == 0 ? 1.0F : 0x1p-4F));
                vstore(part + L * i, vfma(word_floats(acc[i]), by, vload(part + L * i)));
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
            for (int64_t c = 0; c < pad_up(count, kAwqBlock); c += 8)
                _mm256_store_ps(sums.part[m] + c, _mm256_setzero_ps());
        }
        for (int64_t g = g0; g < g0 + per; ++g) {
            (kAwq ? awq_group : gptq_group)(a, at, count, g, rows, x, sums);
            for (int m = 0; m < rows; ++m) sums.sum[m] += sum_of(x + m * stride, a.w.depth)[g];
        }
        for (int m = 0; m < rows; ++m) {
            for (int64_t c = 0; c < count; c += 8) {
                __m256 part = load8(sums.part[m] + c);
                if constexpr (kAwq) {
                    const float* from = sums.part[m] + c / kAwqBlock * kAwqBlock + c / 8 % L;
                    const auto of = [&](int i) { return from[L * kPlace[i]]; };
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
