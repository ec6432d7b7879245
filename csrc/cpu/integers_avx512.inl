// Whole numbers for the AVX-512 units: 32 codes as 16-bit integers in one vector.
#define EMOE_INTEGERS

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
    const __m512i moved = _mm512_slli_epi16(load_unsigned(p).v, 7);
    const __m512i value = _mm512_add_epi16(moved, _mm512_and_si512(moved, _mm512_set1_epi16(0x4000)));  // the sign
    const __m512i all = _mm512_set1_epi16(0x3F80);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(moved, all), all);
    store_halves(_mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FFF)), out);
}

// acc + t * (codes . x), or t[0] and t[1] for either half of the values; kApart: those of even place come first.
template <int kScales, bool kApart>
inline V add_dot(V acc, Codes32 codes, const int16_t* x, const float* t) {
    const V products = {_mm512_cvtepi32_ps(_mm512_madd_epi16(codes.v, _mm512_loadu_si512(x)))};
    if constexpr (kScales == 1) return vfma(products, vset(t[0]), acc);
    constexpr __mmask16 kSecond = kApart ? 0xF0F0 : 0xFF00;
    return vfma(products, {_mm512_mask_broadcastss_ps(vset(t[0]).v, kSecond, _mm_load_ss(t + 1))}, acc);
}

// to[0..32): scale * code + minimum, with a scale for either half where there are two.
template <int kScales>
inline void store_values(float* to, Codes32 codes, const float* scales, float minimum) {
    const V first = {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(codes.v)))};
    const V second = {_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(codes.v, 1)))};
    vstore(to, vfma(first, vset(scales[0]), vset(minimum)));
    vstore(to + 16, vfma(second, vset(scales[kScales == 2 ? 1 : 0]), vset(minimum)));
}

}  // namespace
}  // namespace emoe::cpu
