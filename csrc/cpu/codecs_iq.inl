// Codecs of GGUF's IQ formats, as codecs.inl has them of the others.
namespace emoe::cpu {
namespace {

// Of eight bytes the nibbles, the low one of each first.
inline __m128i nibbles_in_order(__m128i bytes) {
    const __m128i low = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
}
// What Q::scale has as its odd numbers, less one and halved: of eight groups, or of their sixteen halves.
template <class Q>
inline void grid_scales(const unsigned char* p, __m256i (&out)[Q::kHalves ? 2 : 1]) {
    if constexpr (__is_same(Q, iq::Iq2Xs) || __is_same(Q, iq::Iq2S)) {
        const __m128i all = nibbles_in_order(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + Q::kBytes - 8)));
        out[0] = _mm256_cvtepu8_epi32(all);
        out[1] = _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8));
    } else if constexpr (__is_same(Q, iq::Iq1M)) {
        const __m256i by = _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9);
        for (int i = 0; i < 2; ++i) {
            const __m128i first = _mm_set1_epi32((int)iq::word16(p + 48 + 4 * i));
            const __m128i second = _mm_set1_epi32((int)iq::word16(p + 50 + 4 * i));
            out[i] = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set_m128i(second, first), by), _mm256_set1_epi32(7));
        }
    } else if constexpr (__is_same(Q, iq::Iq2Xxs)) {  // in the upper bits of every other word
        const __m256 odd = _mm256_shuffle_ps(_mm256_castsi256_ps(load_bytes32(p + 2)),
                                             _mm256_castsi256_ps(load_bytes32(p + 34)), 0xDD);
        out[0] = _mm256_srli_epi32(_mm256_permute4x64_epi64(_mm256_castps_si256(odd), 0xD8), 28);
    } else if constexpr (__is_same(Q, iq::Iq3Xxs)) {
        out[0] = _mm256_srli_epi32(load_bytes32(p + 66), 28);
    } else if constexpr (__is_same(Q, iq::Iq3S)) {
        out[0] = _mm256_cvtepu8_epi32(nibbles_in_order(_mm_cvtsi32_si128((int)iq::word32(p + 106))));
    } else {
        const __m256i wide = _mm256_cvtepu16_epi32(load_bytes16(p + 34));
        out[0] = _mm256_and_si256(_mm256_srli_epi32(wide, 12), _mm256_set1_epi32(7));
    }
}
// Formats of a grid (core/iq.hpp), whose entries are bytes.
template <class Q>
struct OfGrid : Large<Q::kBytes, Q::kHalves ? 2 : 1> {
    using Blocks = Large<Q::kBytes, Q::kHalves ? 2 : 1>;
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        const unsigned char* p = Blocks::block(row, g);
        const auto of = [&](int l) { return (long long)Q::entry(p, j, l); };
        const auto half = [&](int l) { return (int)Q::entry(p, j, l); };
        __m256i bytes;
        if constexpr (sizeof(typename Q::Entry) == 8) {
            bytes = _mm256_setr_epi64x(of(0), of(1), of(2), of(3));
        } else {
            bytes = _mm256_setr_epi32(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7));
        }
        if constexpr (requires { &Q::offset; }) {
            const auto more = [&](int l) { return Q::offset(p, j, l) > 0 ? 0x0101010101010101LL : -1LL; };
            return widen_signed(_mm256_add_epi8(bytes, _mm256_setr_epi64x(more(0), more(1), more(2), more(3))));
        } else {
            const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
            const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201);
            const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)Q::signs(p, j)), byte);
            const __m256i less = _mm256_cmpeq_epi8(_mm256_and_si256(spread, one), one);
            return widen_signed(_mm256_sub_epi8(_mm256_xor_si256(bytes, less), less));
        }
    }
    static Scales<Blocks::kScales> scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const unsigned char* p = Blocks::block(row, g0);
        const __m128i unit = _mm_cvtsi32_si128((int)Q::unit(p));
        const __m256 by = _mm256_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(unit)) * Q::kBy);
        __m256i halved[Blocks::kScales];
        grid_scales<Q>(p, halved);
        Scales<Blocks::kScales> found;
        for (int s = 0; s < Blocks::kScales; ++s) {
            const __m256i odd = _mm256_add_epi32(_mm256_add_epi32(halved[s], halved[s]), _mm256_set1_epi32(1));
            found.scale[s] = _mm256_mul_ps(_mm256_cvtepi32_ps(odd), by);
        }
        found.minimum = _mm256_setzero_ps();
        return found;
    }
};

}  // namespace
}  // namespace emoe::cpu
