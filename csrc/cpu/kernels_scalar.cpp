// The portable unit: four lanes of plain C++, for CPUs without AVX2 and as the first thing to compare with.
#include "cpu/kernels.hpp"

#define EMOE_KERNELS kScalarKernels
#define EMOE_ISA_NAME "scalar"

namespace emoe::cpu {
namespace {

struct V {
    static constexpr int kLanes = 4;
    float f[4];
};
constexpr int kMicroRows = 2;
constexpr bool kManyRegisters = false;

#define EMOE_LANES for (int l = 0; l < V::kLanes; ++l)
inline V vzero() { return V{{0, 0, 0, 0}}; }
inline V vset(float a) { return V{{a, a, a, a}}; }
inline V vload(const float* p) {
    V r;
    __builtin_memcpy(r.f, p, sizeof r.f);
    return r;
}
inline void vstore(float* p, V a) { __builtin_memcpy(p, a.f, sizeof a.f); }
inline V vadd(V a, V b) {
    EMOE_LANES a.f[l] += b.f[l];
    return a;
}
inline V vsub(V a, V b) {
    EMOE_LANES a.f[l] -= b.f[l];
    return a;
}
inline V vmul(V a, V b) {
    EMOE_LANES a.f[l] *= b.f[l];
    return a;
}
inline V vdiv(V a, V b) {
    EMOE_LANES a.f[l] /= b.f[l];
    return a;
}
inline V vfma(V a, V b, V c) {
    EMOE_LANES c.f[l] += a.f[l] * b.f[l];
    return c;
}
inline V vmin(V a, V b) {
    EMOE_LANES b.f[l] = a.f[l] < b.f[l] ? a.f[l] : b.f[l];
    return b;
}
inline V vmax(V a, V b) {
    EMOE_LANES b.f[l] = a.f[l] > b.f[l] ? a.f[l] : b.f[l];
    return b;
}
inline V vround(V a) {
    EMOE_LANES a.f[l] = __builtin_rintf(a.f[l]);
    return a;
}
inline V vscale2(V a, V n) {  // a * 2^n, n whole
    EMOE_LANES {
        const int whole = n.f[l] == n.f[l] ? (int)n.f[l] : 0;
        const uint32_t bits = (uint32_t)(whole + 127) << 23;
        float power;
        __builtin_memcpy(&power, &bits, 4);
        a.f[l] *= power;
    }
    return a;
}
inline float vsum(V a) { return (a.f[0] + a.f[2]) + (a.f[1] + a.f[3]); }
#undef EMOE_LANES

}  // namespace
}  // namespace emoe::cpu

#define EMOE_GENERIC_LOADS
#include "cpu/kernels.inl"
