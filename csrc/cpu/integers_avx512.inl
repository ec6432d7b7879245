// Whole numbers for the AVX-512 units: 32 codes as 16-bit integers in one vector.
#define EMOE_INTEGERS
#define EMOE_QUADS

namespace emoe::cpu {
namespace {

struct Codes32 {
    __m512i v;
};

inline Codes32 widen_signed(__m256i bytes) { return {_mm512_cvtepi8_epi16(bytes)}; }
inline Codes32 widen_unsigned(__m256i bytes) { return {_mm512_cvtepu8_epi16(bytes)}; }
inline Codes32 load_signed(const unsigned char* p) {
    return widen_signed(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Codes32 load_unsigned(const unsigned char* p) {
    return widen_unsigned(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Bits kShift to kShift + 3 of widened bytes.
template <int kShift>
inline Codes32 nibbles_of(Codes32 wide) {
    if constexpr (kShift == 4) return {_mm512_srli_epi16(wide.v, 4)};
    return {_mm512_and_si512(wide.v, _mm512_set1_epi16(15))};
}
// 16 bytes: low nibbles first, then high ones.
inline __m256i halves(const unsigned char* p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}
inline Codes32 load_halves(const unsigned char* p) { return widen_unsigned(halves(p)); }
// The same, each looked up in a table of 16.
inline Codes32 look_up_halves(const unsigned char* p, __m128i table) {
    return widen_signed(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), halves(p)));
}
// The same, and sixteen more where the bit is set.
inline Codes32 load_halves_and_bits(const unsigned char* p, const unsigned char* bits) {
    uint32_t set;
    __builtin_memcpy(&set, bits, 4);
    const __m512i codes = load_halves(p).v;
    return {_mm512_mask_add_epi16(codes, set, codes, _mm512_set1_epi16(16))};
}

// Those of even place first: back in order.
inline Codes32 together(Codes32 codes) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes.v, 1));
    const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes.v));
    return {_mm512_or_si512(even, _mm512_slli_epi32(wide, 16))};
}
inline void store_halves(__m512i halves, V (&out)[2]) {
    out[0] = {_mm512_cvtph_ps(_mm512_castsi512_si256(halves))};
    out[1] = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
inline void load_e5m2(const unsigned char* p, V (&out)[2]) {
    store_halves(_mm512_slli_epi16(load_unsigned(p).v, 8), out);
}
// 2^8 times too small; 0x7F is no number.
inline void load_e4m3(const unsigned char* p, V (&out)[2]) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i moved = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);  // the sign is there twice
    const __m512i value = _mm512_and_si512(moved, _mm512_set1_epi16((short)0xBFFF));
    const __mmask32 nan = _mm256_cmpeq_epi8_mask(_mm256_or_si256(bytes, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-1));
    store_halves(_mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FFF)), out);
}

#if defined(EMOE_BYTE_TABLES)
// The upper half of the float that each byte of e4m3 stands for, without its sign and 2^8 times too small: its high
// byte and its low one. 0x7F is no number.
struct HalvesOfE4M3 {
    unsigned char of[2][128];
};
constexpr HalvesOfE4M3 halves_of_e4m3() {
    HalvesOfE4M3 made{};
    for (int code = 0; code < 128; ++code) {
        const int exponent = code >> 3;
        const int fraction = code & 7;
        int bits = (exponent + 112) << 7 | fraction << 4;
        if (exponent == 0) {
            const int first = fraction >= 4 ? 2 : fraction >= 2 ? 1 : 0;
            bits = fraction == 0 ? 0 : (first + 110) << 7 | (fraction - (1 << first)) << (7 - first);
        }
        if (code == 127) bits = 0x7FC0;
        made.of[0][code] = (unsigned char)(bits >> 8);
        made.of[1][code] = (unsigned char)(bits & 0xFF);
    }
    return made;
}
alignas(64) constexpr HalvesOfE4M3 kHalvesOfE4M3 = halves_of_e4m3();

// 64 bytes of e4m3 as floats, 2^8 times too small: of each sixteen the first eight in out[0], those of even place, and
// out[1], the others in out[2] and out[3].
inline void look_up_e4m3(__m512i bytes, V (&out)[4]) {
    const auto half = [&](const unsigned char (&table)[128]) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
    };
    const __m512i high =
        _mm512_ternarylogic_epi64(half(kHalvesOfE4M3.of[0]), bytes, _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
    const __m512i low = half(kHalvesOfE4M3.of[1]);
    const __m512i halves[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    for (int i = 0; i < 2; ++i) {
        out[2 * i] = {_mm512_castsi512_ps(_mm512_slli_epi32(halves[i], 16))};
        out[2 * i + 1] = {_mm512_castsi512_ps(_mm512_and_si512(halves[i], _mm512_set1_epi32((int)0xFFFF0000)))};
    }
}
// Which of two scales is that of a lane of these, where the first is that of the first 32.
inline V turned_scales(const float* two) {
    const __m512i place = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(two));
    return {_mm512_permutexvar_ps(place, _mm512_castsi512_ps(_mm512_castsi128_si512(both)))};
}
#endif

// acc + t * (codes . x), or t[0] and t[1] for either half of the values; kApart: those of even place come first.
template <int kScales, bool kApart>
inline V add_dot(V acc, Codes32 codes, const int16_t* x, const float* t) {
    const V products = {_mm512_cvtepi32_ps(_mm512_madd_epi16(codes.v, _mm512_loadu_si512(x)))};
    if constexpr (kScales == 1) return vfma(products, vset(t[0]), acc);
    constexpr __mmask16 kSecond = kApart ? 0xF0F0 : 0xFF00;
    return vfma(products, {_mm512_mask_broadcastss_ps(vset(t[0]).v, kSecond, _mm_load_ss(t + 1))}, acc);
}

// Four groups at a time: their codes as 16-bit numbers in four parts, in the order of x that the codec names.

// Unsigned bytes: those of even place, those of odd place.
inline void split_unsigned(__m512i bytes, __m512i& even, __m512i& odd) {
    even = _mm512_and_si512(bytes, _mm512_set1_epi16(0xFF));
    odd = _mm512_srli_epi16(bytes, 8);
}
inline void split_signed(__m512i bytes, __m512i& even, __m512i& odd) {
    even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
    odd = _mm512_srai_epi16(bytes, 8);
}
// 2^8 times as large; at most 32, so that four products of x fit into 32 bits.
inline void split_large(__m512i bytes, __m512i& even, __m512i& odd) {
    even = _mm512_slli_epi16(bytes, 8);
    odd = _mm512_and_si512(bytes, _mm512_set1_epi16((short)0xFF00));
}
inline void quad_of_nibbles(__m512i bytes, __m512i (&parts)[4]) {
    const __m512i low = _mm512_set1_epi16(15);
    parts[0] = _mm512_and_si512(bytes, low);
    parts[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 8), low);
    parts[2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    parts[3] = _mm512_srli_epi16(bytes, 12);
}
// kLarge: as split_large, values at most 12.
template <bool kLarge>
inline void quad_of_table(__m512i bytes, __m128i table, __m512i (&parts)[4]) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i all = _mm512_broadcast_i32x4(table);
    const __m512i first = _mm512_shuffle_epi8(all, _mm512_and_si512(bytes, low));
    const __m512i second = _mm512_shuffle_epi8(all, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
    (kLarge ? split_large : split_signed)(first, parts[0], parts[1]);
    (kLarge ? split_large : split_signed)(second, parts[2], parts[3]);
}
// Sixteen more where the bit is set: 32 bits for each group, `apart` bytes from each other.
inline void quad_of_nibbles_and_bits(__m512i bytes, const unsigned char* bits, int64_t apart, __m512i (&parts)[4]) {
    uint64_t first = 0;
    uint64_t second = 0;
    for (int i = 3; i >= 0; --i) {
        uint16_t halves[2];
        __builtin_memcpy(halves, bits + i * apart, 4);
        first = first << 16 | halves[0];
        second = second << 16 | halves[1];
    }
    const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
    split_unsigned(_mm512_mask_add_epi8(low, first, low, _mm512_set1_epi8(16)), parts[0], parts[1]);
    split_unsigned(_mm512_mask_add_epi8(high, second, high, _mm512_set1_epi8(16)), parts[2], parts[3]);
}

inline __m512i add_products(__m512i sum, __m512i codes, const int16_t* x) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, codes, _mm512_loadu_si512(x));
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(codes, _mm512_loadu_si512(x)));
#endif
}
// acc + t * (codes . x) for groups 4 q to 4 q + 3 of a step; t has its eight scales, or sixteen.
template <int kScales, bool kPairs, int q>
inline V add_quad(V acc, const __m512i (&parts)[4], const int16_t* x, __m512 t) {
    const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    // Which scale is that of a lane.
    const auto scale_of_lane = [&](int p) {
        __m512i group = kPairs ? _mm512_slli_epi32(_mm512_srli_epi32(place, 3), 1) : _mm512_srli_epi32(place, 2);
        group = _mm512_add_epi32(group, _mm512_set1_epi32(4 * q + p));
        if constexpr (kScales == 1) return group;
        const __m512i half = _mm512_and_si512(_mm512_srli_epi32(place, kPairs ? 2 : 1), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(group, group), half);
    };
    const auto scaled = [&](__m512i sum, int p) {
        acc = vfma({_mm512_cvtepi32_ps(sum)}, {_mm512_permutexvar_ps(scale_of_lane(p), t)}, acc);
    };
    __m512i sum = add_products(add_products(_mm512_setzero_si512(), parts[0], x), parts[1], x + 32);
    if constexpr (kPairs) {
        scaled(sum, 0);
        sum = _mm512_setzero_si512();
    }
    sum = add_products(add_products(sum, parts[2], x + 64), parts[3], x + 96);
    scaled(sum, kPairs ? 1 : 0);
    return acc;
}

// Words of AWQ and GPTQ, as many as a vector of floats has lanes.
using Words = __m512i;
inline Words word_set(int bits) { return _mm512_set1_epi32(bits); }
inline Words word_and(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words word_add(Words a, Words b) { return _mm512_add_epi32(a, b); }
template <int kBy>
inline Words word_left(Words a) {
    return _mm512_slli_epi32(a, kBy);
}
template <int kBy>
inline Words word_right(Words a) {
    return _mm512_srli_epi32(a, kBy);
}
template <int kBy>
inline Words word_right_signed(Words a) {
    return _mm512_srai_epi32(a, kBy);
}
// The low half of each of a, the high half of each of b.
inline Words word_mix(Words a, Words b) { return _mm512_mask_blend_epi16(0xAAAAAAAAU, a, b); }
inline Words word_load(const unsigned char* p, int64_t n) {  // zero from n on
    return _mm512_maskz_loadu_epi32(n >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1U << n) - 1U), p);
}
// sum + the products of both halves with those of `pair`.
inline Words word_dot(Words sum, Words codes, int pair) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, codes, _mm512_set1_epi32(pair));
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(codes, _mm512_set1_epi32(pair)));
#endif
}
inline V word_floats(Words a) { return {_mm512_cvtepi32_ps(a)}; }

// to[0..32): scale * code + minimum, with a scale for either half where there are two.
template <int kScales>
inline void store_values(float* to, Codes32 codes, const float* scales, float low, float high) {
    const V first = {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(codes.v)))};
    const V second = {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(codes.v, 1)))};
    vstore(to, vfma(first, vset(scales[0]), vset(low)));
    vstore(to + 16, vfma(second, vset(scales[kScales == 2 ? 1 : 0]), vset(high)));
}

}  // namespace
}  // namespace emoe::cpu
