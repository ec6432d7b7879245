// Sixteen lanes, shared by the two AVX-512 units.

// GCC 12 calls its own _mm512_undefined_ps() uninitialized (GCC PR 105593), wherever an intrinsic is inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace emoe::cpu {
namespace {

struct V {
    static constexpr int kLanes = 16;
    __m512 v;
};
constexpr int kMicroRows = 8;  // 8x2 accumulators hide the latency of both FMA pipes and divide every usual size
constexpr bool kManyRegisters = true;

inline V vzero() { return {_mm512_setzero_ps()}; }
inline V vset(float a) { return {_mm512_set1_ps(a)}; }
inline V vload(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V vload_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline V vload_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void vstore(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline V vadd(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V vsub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V vmul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V vdiv(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V vfma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V vmin(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN, as in every unit
inline V vmax(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V vround(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V vscale2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Eight sums of its lanes.
inline __m256 halved(V a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
inline float vsum(V a) {
    const __m256 high = _mm512_extractf32x8_ps(a.v, 1);
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#if defined(EMOE_BF16_PAIRS)
inline void store_pairs(V first, V second, void* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
}
inline V vdot_pairs(V acc, V pairs, V other) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_castps_si512(pairs.v), (__m512bh)_mm512_castps_si512(other.v))};
}
#endif

}  // namespace
}  // namespace emoe::cpu
