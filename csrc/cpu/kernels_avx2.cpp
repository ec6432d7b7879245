// The AVX2 + FMA + F16C unit. Nothing here may run before the CPU was asked (kernels.cpp).
#include "cpu/kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define EMOE_KERNELS kAvx2Kernels
#define EMOE_ISA_NAME "avx2"

namespace emoe::cpu {
namespace {

struct V {
    static constexpr int kLanes = 8;
    __m256 v;
};
constexpr int kMicroRows = 6;  // 6x2 accumulators + 2 rows + 1 broadcast: 15 of 16 registers
constexpr bool kManyRegisters = false;

inline V vzero() { return {_mm256_setzero_ps()}; }
inline V vset(float a) { return {_mm256_set1_ps(a)}; }
inline V vload(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V vload_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline V vload_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void vstore(float* p, V a) { _mm256_storeu_ps(p, a.v); }
inline V vadd(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V vsub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V vmul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V vdiv(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V vfma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline V vmin(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }  // b where either is NaN, as in every unit
inline V vmax(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V vround(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V vscale2(V a, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
// Eight sums of its lanes.
inline __m256 halved(V a) { return a.v; }
inline float vsum(V a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace
}  // namespace emoe::cpu

#include "cpu/integers_avx2.inl"
#include "cpu/kernels.inl"
#endif
