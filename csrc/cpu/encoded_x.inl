// Narrow rows of x as encoded weights meet them: beside their floats 16-bit integers with a scale for every 32 of them,
// and the floats in another order, made once per call.
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

// The floats of groups [g0, g1) of a narrow row in the order in which Q::turned gives those of
// weights: of each sixteen of 64 the first eight, those of even place, then those of odd place; then the others.
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

}  // namespace
}  // namespace emoe::cpu
