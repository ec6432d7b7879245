// Whole numbers for the AVX2 unit: 32 codes as 16-bit integers in two vectors.
#define EMOE_INTEGERS

namespace emoe::cpu {
namespace {

struct Codes32 {
    __m256i a;  // values 0 to 15
    __m256i b;
};

inline Codes32 widen_signed(__m256i bytes) {
    return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
}
inline Codes32 widen_unsigned(__m256i bytes) {
    return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
            _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1))};
}
inline Codes32 load_signed(const unsigned char* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
inline Codes32 load_unsigned(const unsigned char* p) {
    return {_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
// Bits kShift to kShift + 3 of widened bytes.
template <int kShift>
inline Codes32 nibbles_of(Codes32 wide) {
    const __m256i low = _mm256_set1_epi16(15);
    if constexpr (kShift == 4) return {_mm256_srli_epi16(wide.a, 4), _mm256_srli_epi16(wide.b, 4)};
    return {_mm256_and_si256(wide.a, low), _mm256_and_si256(wide.b, low)};
}
// 16 bytes: low nibbles first, then high ones.
inline Codes32 load_halves(const unsigned char* p) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_and_si256(wide, _mm256_set1_epi16(15)), _mm256_srli_epi16(wide, 4)};
}
// The same, each looked up in a table of 16.
inline Codes32 look_up_halves(const unsigned char* p, __m128i table) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    return {_mm256_cvtepi8_epi16(_mm_shuffle_epi8(table, low)), _mm256_cvtepi8_epi16(_mm_shuffle_epi8(table, high))};
}
// The same, and sixteen more where the bit is set.
inline Codes32 load_halves_and_bits(const unsigned char* p, const unsigned char* bits) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i nibbles =
        _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
    int all;
    __builtin_memcpy(&all, bits, 4);
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(all), byte), one);
    const __m256i set = _mm256_and_si256(_mm256_cmpeq_epi8(spread, one), _mm256_set1_epi8(16));
    return widen_unsigned(_mm256_or_si256(nibbles, set));
}

// Those of even place first: back in order.
inline Codes32 together(Codes32 codes) {
    const __m256i low = _mm256_unpacklo_epi16(codes.a, codes.b);
    const __m256i high = _mm256_unpackhi_epi16(codes.a, codes.b);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}
inline void load_e5m2(const unsigned char* p, V (&out)[4]) {
    for (int i = 0; i < 4; ++i) {
        const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
        out[i] = {_mm256_cvtph_ps(_mm_slli_epi16(wide, 8))};
    }
}
// 2^8 times too small: the bytes of the float16 are made apart. 0x7F is no number.
inline void load_e4m3(const unsigned char* p, V (&out)[4]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i sign = _mm256_set1_epi8(-128);
    const __m256i low = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), sign);
    const __m256i most = _mm256_and_si256(_mm256_srli_epi16(bytes, 1), _mm256_set1_epi8(0x3F));
    const __m256i nan = _mm256_cmpeq_epi8(_mm256_or_si256(bytes, sign), _mm256_set1_epi8(-1));
    const __m256i high = _mm256_or_si256(_mm256_or_si256(most, _mm256_and_si256(bytes, sign)), nan);
    const __m256i even = _mm256_unpacklo_epi8(low, high);  // values 0 to 7 and 16 to 23
    const __m256i odd = _mm256_unpackhi_epi8(low, high);
    out[0] = {_mm256_cvtph_ps(_mm256_castsi256_si128(even))};
    out[1] = {_mm256_cvtph_ps(_mm256_castsi256_si128(odd))};
    out[2] = {_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1))};
    out[3] = {_mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1))};
}

// acc + t * (codes . x), or t[0] and t[1] for either half of the values; kApart: those of even place come first.
template <int kScales, bool kApart>
inline V add_dot(V acc, Codes32 codes, const int16_t* x, const float* t) {
    const __m256i a = _mm256_madd_epi16(codes.a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    const __m256i b = _mm256_madd_epi16(codes.b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16)));
    if constexpr (kScales == 2 && !kApart) {
        acc = vfma({_mm256_cvtepi32_ps(a)}, vset(t[0]), acc);
        return vfma({_mm256_cvtepi32_ps(b)}, vset(t[1]), acc);
    }
    const V products = {_mm256_cvtepi32_ps(_mm256_add_epi32(a, b))};
    if constexpr (kScales == 2) return vfma(products, {_mm256_blend_ps(vset(t[0]).v, vset(t[1]).v, 0xF0)}, acc);
    return vfma(products, vset(t[0]), acc);
}

// Words of AWQ and GPTQ, as many as a vector of floats has lanes.
using Words = __m256i;
inline Words word_set(int bits) { return _mm256_set1_epi32(bits); }
inline Words word_and(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words word_add(Words a, Words b) { return _mm256_add_epi32(a, b); }
template <int kBy>
inline Words word_left(Words a) {
    return _mm256_slli_epi32(a, kBy);
}
template <int kBy>
inline Words word_right(Words a) {
    return _mm256_srli_epi32(a, kBy);
}
template <int kBy>
inline Words word_right_signed(Words a) {
    return _mm256_srai_epi32(a, kBy);
}
// The low half of each of a, the high half of each of b.
inline Words word_mix(Words a, Words b) { return _mm256_blend_epi16(a, b, 0xAA); }
inline Words word_load(const unsigned char* p, int64_t n) {  // zero from n on
    if (n >= 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes));
}
// sum + the products of both halves with those of `pair`.
inline Words word_dot(Words sum, Words codes, int pair) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, _mm256_set1_epi32(pair)));
}
inline V word_floats(Words a) { return {_mm256_cvtepi32_ps(a)}; }

// to[0..32): scale * code + minimum, with a scale for either half where there are two; `low` and `high` are the
// minima of the halves.
template <int kScales>
inline void store_values(float* to, Codes32 codes, const float* scales, float low, float high) {
    for (int i = 0; i < 4; ++i) {
        const __m256i half = i < 2 ? codes.a : codes.b;
        const __m128i eight = i % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
        const V value = {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight))};
        vstore(to + 8 * i, vfma(value, vset(scales[kScales == 2 ? i / 2 : 0]), vset(i < 2 ? low : high)));
    }
}

}  // namespace
}  // namespace emoe::cpu
