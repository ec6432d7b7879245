// The one body of the expert MLP, compiled once per instruction set. The including unit has defined V (a vector of
// kLanes floats), its operations, kMicroRows, EMOE_KERNELS and EMOE_ISA_NAME.
// Everything stays in the unnamed namespace and no std:: template or inline function is used: a weak symbol compiled
// here could be the copy that a CPU without these instructions runs.
#include <math.h>

#include "core/iq.hpp"
#include "cpu/expand.hpp"

namespace emoe::cpu {
namespace {

using Bits = uint32_t __attribute__((may_alias));
constexpr int L = V::kLanes;
constexpr int kPanel = 2 * L;  // rows of one wide panel: two vectors

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pad_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline uint32_t bits_of(float a) {
    uint32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float a;
    __builtin_memcpy(&a, &bits, 4);
    return a;
}
inline uint16_t half_at(const unsigned char* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return bits;
}
inline uint32_t bf16_of(float a) {  // nearest even; a NaN stays one
    const uint32_t bits = bits_of(a);
    const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    return (bits & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC0U : rounded;
}
inline float float_of_f16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000U) << 16;
    const uint32_t rest = (uint32_t)(half & 0x7FFFU) << 13;
    if (rest >= 0x0F800000U) return float_of(sign | (rest + 0x70000000U));  // inf, NaN
    // The multiplication by 2^112 moves the exponent and normalizes what is subnormal in f16.
    return float_of(sign | bits_of(float_of(rest) * 5.192296858534828e33F));
}
inline uint32_t f16_of(float a) {  // nearest even
    const uint32_t bits = bits_of(a);
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t rest = bits & 0x7FFFFFFFU;
    if (rest > 0x7F800000U) return sign | 0x7E00U;
    if (rest >= 0x477FF000U) return sign | 0x7C00U;  // rounds past 65504
    if (rest < 0x38800000U)
        return sign | (bits_of(float_of(rest) + 0.5F) - bits_of(0.5F));  // subnormal: ulp of 0.5 is 2^-24
    return sign | ((rest + 0xC8000FFFU + ((rest >> 13) & 1U)) >> 13);
}

#if defined(EMOE_GENERIC_LOADS)
inline V vload_bf16(const uint16_t* p) {
    V r;
    for (int l = 0; l < L; ++l)
        r.f[l] = float_of((uint32_t)half_at(reinterpret_cast<const unsigned char*>(p + l)) << 16);
    return r;
}
inline V vload_f16(const uint16_t* p) {
    V r;
    for (int l = 0; l < L; ++l) r.f[l] = float_of_f16(half_at(reinterpret_cast<const unsigned char*>(p + l)));
    return r;
}
#endif

// Element types of weights and hidden states. Addresses are bytes: a slot's tensors need not be aligned.
struct F32 {
    static constexpr int64_t kSize = 4;
    static V load(const unsigned char* p) { return vload(reinterpret_cast<const float*>(p)); }
    static float one(const unsigned char* p) {
        float a;
        __builtin_memcpy(&a, p, 4);
        return a;
    }
};
struct Bf16 {
    static constexpr int64_t kSize = 2;
    static V load(const unsigned char* p) { return vload_bf16(reinterpret_cast<const uint16_t*>(p)); }
    static float one(const unsigned char* p) { return float_of((uint32_t)half_at(p) << 16); }
};
struct F16 {
    static constexpr int64_t kSize = 2;
    static V load(const unsigned char* p) { return vload_f16(reinterpret_cast<const uint16_t*>(p)); }
    static float one(const unsigned char* p) { return float_of_f16(half_at(p)); }
};

// n < L elements, the rest zero. Reading past the end would leave the slot, or turn a neighbour's NaN into NaN * 0.
template <class W>
inline V load_tail(const unsigned char* p, int64_t n) {
    unsigned char bytes[L * 4] = {};
    __builtin_memcpy(bytes, p, (size_t)(n * W::kSize));
    return W::load(bytes);
}

// Relative error about 1e-7. The bound is the first operand, so that a NaN passes.
inline V vexp(V x) {
    x = vmax(vset(-87.0F), vmin(vset(88.0F), x));
    const V n = vround(vmul(x, vset(1.44269504088896341F)));
    V r = vfma(n, vset(-0.693359375F), x);
    r = vfma(n, vset(2.12194440e-4F), r);
    V p = vset(1.9875691500e-4F);
    p = vfma(p, r, vset(1.3981999507e-3F));
    p = vfma(p, r, vset(8.3334519073e-3F));
    p = vfma(p, r, vset(4.1665795894e-2F));
    p = vfma(p, r, vset(1.6666665459e-1F));
    p = vfma(p, r, vset(5.0000001201e-1F));
    return vscale2(vfma(p, vmul(r, r), vadd(r, vset(1.0F))), n);
}
inline V vsigmoid(V x) { return vdiv(vset(1.0F), vadd(vset(1.0F), vexp(vsub(vzero(), x)))); }
inline V vgelu(V x) {  // exact form; libm per lane, slower than the others
    float a[L];
    vstore(a, x);
    for (int l = 0; l < L; ++l) a[l] = 0.5F * a[l] * (1.0F + ::erff(a[l] * 0.70710678118654752F));
    return vload(a);
}

// activation(gate) * up; without a gate `up` is one.
inline V activate(const MlpLayout& layout, V gate, V up) {
    switch (layout.activation) {
        case Activation::kSilu:
            return vmul(vmul(gate, vsigmoid(gate)), up);
        case Activation::kGelu:
            return vmul(vgelu(gate), up);
        case Activation::kGeluTanh: {  // 0.5 (1 + tanh y) is sigmoid(2y), without its cancellation
            const V y = vmul(gate, vfma(vmul(gate, gate), vset(0.044715F), vset(1.0F)));
            return vmul(vmul(gate, vsigmoid(vmul(y, vset(1.5957691216057308F)))), up);
        }
        case Activation::kRelu:
            return vmul(vmax(vzero(), gate), up);
        case Activation::kRelu2: {
            const V positive = vmax(vzero(), gate);
            return vmul(vmul(positive, positive), up);
        }
        case Activation::kIdentity:
            return vmul(gate, up);
        case Activation::kSwigluClamped: {
            const V g = vmin(vset(layout.limit), gate);
            const V u = vmax(vset(-layout.limit), vmin(vset(layout.limit), up));
            return vmul(vmul(vadd(u, vset(1.0F)), g), vsigmoid(vmul(g, vset(layout.alpha))));
        }
        case Activation::kSiluClamped: {
            const V g = vmin(vset(layout.limit), gate);
            const V u = vmax(vset(-layout.limit), vmin(vset(layout.limit), up));
            return vmul(vmul(g, vsigmoid(g)), u);
        }
    }
    return gate;
}

// One weight matrix of a slot: `rows` outputs of `depth` products each.
struct Matrix {
    const unsigned char* data;
    const unsigned char* bias;  // null: none
    int64_t rows;
    int64_t depth;
    bool transposed;
};
inline Matrix gate_up_of(const MlpLayout& a, const unsigned char* slot) {
    const unsigned char* bias = a.gate_up_bias_offset < 0 ? nullptr : slot + a.gate_up_bias_offset;
    return {slot + a.gate_up_offset, bias, (a.has_gate ? 2 : 1) * a.intermediate, a.hidden, a.transposed};
}
inline Matrix down_of(const MlpLayout& a, const unsigned char* slot) {
    const unsigned char* bias = a.down_bias_offset < 0 ? nullptr : slot + a.down_bias_offset;
    return {slot + a.down_offset, bias, a.hidden_out, a.intermediate, a.transposed};
}

// Where the matrix rows of intermediate columns [i0,i1) lie (one or two ranges), and where each column's gate and up
// land among the rows computed for them: column j at j*step, its up row `up` further.
struct GateRows {
    int64_t first[2];
    int64_t count[2];
    int64_t step;
    int64_t up;
    int64_t total() const { return count[0] + count[1]; }
};
inline GateRows gate_rows(const MlpLayout& a, int64_t i0, int64_t i1) {
    const int64_t n = i1 - i0;
    if (!a.has_gate) return {{i0, 0}, {n, 0}, 1, 0};
    if (a.interleaved) return {{2 * i0, 0}, {2 * n, 0}, 2, 1};
    return {{i0, a.intermediate + i0}, {n, n}, 1, n};
}
template <class W>
inline float bias_at(const Matrix& a, int64_t row) {
    return a.bias ? W::one(a.bias + row * W::kSize) : 0.0F;
}
inline int64_t gate_row(const MlpLayout& a, int64_t i) { return a.has_gate && a.interleaved ? 2 * i : i; }
inline int64_t up_row(const MlpLayout& a, int64_t i) { return a.interleaved ? 2 * i + 1 : a.intermediate + i; }

}  // namespace
}  // namespace emoe::cpu

#include "cpu/narrow.inl"
#include "cpu/wide.inl"

namespace emoe::cpu {
namespace {

// Some of the rows of an encoded matrix, and where the expert lies.
struct Source {
    const Weights& w;
    const unsigned char* slot;
};

}  // namespace
}  // namespace emoe::cpu

#if defined(EMOE_INTEGERS)
#include "cpu/codecs.inl"
#include "cpu/codecs_iq.inl"
#include "cpu/encoded_x.inl"

#include "cpu/encoded_integers.inl"

#include "cpu/encoded_columns.inl"
#endif
#include "cpu/encoded_expand.inl"

#include "cpu/encoded_narrow.inl"
#include "cpu/encoded_wide.inl"
#include "cpu/linear.inl"

#include "cpu/attention.inl"
#include "cpu/fit.inl"

namespace emoe::cpu {
namespace {

template <class X>
void load_rows_as(const Job& job, const Chunk& chunk, int64_t k0, int64_t k1) {
    if (chunk.wide) {
        wide_load<X>(job, chunk, k0, k1);
    } else {
        narrow_load<X>(job, chunk, k0, k1);
#if defined(EMOE_INTEGERS)
        if (job.layout->encoded) encoded_narrow_load(job, chunk, k0, k1);
#endif
    }
}
void load_rows(const Job& job, const Chunk& chunk, int64_t k0, int64_t k1) {
    switch (job.hidden_dtype) {
        case DType::kFloat32:
            return load_rows_as<F32>(job, chunk, k0, k1);
        case DType::kBFloat16:
            return load_rows_as<Bf16>(job, chunk, k0, k1);
        default:
            return load_rows_as<F16>(job, chunk, k0, k1);
    }
}
template <class W>
void gate_up_as(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const int64_t ratio = job.layout->has_gate ? 2 : 1;
    const int64_t most = (chunk.wide ? kSubBlock : kNarrowBlock) / ratio;
    for (int64_t i = i0; i < i1; i += most) {
        if (chunk.wide) {
            wide_gate_up<W>(job, chunk, i, least(i + most, i1));
        } else {
            narrow_gate_up<W>(job, chunk, i, least(i + most, i1));
        }
    }
}
void encoded_gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const int64_t most = chunk.wide ? kSubBlock / 2 : kNarrowBlock;
    for (int64_t i = i0; i < i1; i += most) {
        (chunk.wide ? encoded_wide_gate_up : encoded_narrow_gate_up)(job, chunk, i, least(i + most, i1));
    }
}
void gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    if (job.layout->encoded) return encoded_gate_up(job, chunk, i0, i1);
    switch (job.layout->dtype) {
        case DType::kFloat32:
            return gate_up_as<F32>(job, chunk, i0, i1);
        case DType::kBFloat16:
            return gate_up_as<Bf16>(job, chunk, i0, i1);
        default:
            return gate_up_as<F16>(job, chunk, i0, i1);
    }
}
template <class W>
void down_as(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const int64_t most = chunk.wide ? kSubBlock : kNarrowBlock;
    for (int64_t n = n0; n < n1; n += most) {
        if (chunk.wide) {
            wide_down<W>(job, chunk, n, least(n + most, n1));
        } else {
            narrow_down<W>(job, chunk, n, least(n + most, n1));
        }
    }
}
void encoded_down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const int64_t most = chunk.wide ? kSubBlock : kNarrowBlock;
    for (int64_t n = n0; n < n1; n += most) {
        (chunk.wide ? encoded_wide_down : encoded_narrow_down)(job, chunk, n, least(n + most, n1));
    }
}
void down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    if (job.layout->encoded) return encoded_down(job, chunk, n0, n1);
    switch (job.layout->dtype) {
        case DType::kFloat32:
            return down_as<F32>(job, chunk, n0, n1);
        case DType::kBFloat16:
            return down_as<Bf16>(job, chunk, n0, n1);
        default:
            return down_as<F16>(job, chunk, n0, n1);
    }
}

void combine(const float* pairs, int64_t top_k, int64_t n, void* out, DType dtype) {
    auto* bytes = static_cast<unsigned char*>(out);
    for (int64_t i = 0; i < n; i += L) {
        const int64_t count = least(L, n - i);
        float sum[L] = {};
        for (int64_t k = 0; k < top_k; ++k) {
            const float* row = pairs + k * n + i;
            if (count == L) {
                vstore(sum, vadd(vload(sum), vload(row)));
            } else {
                for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
            }
        }
        if (dtype == DType::kFloat32) {
            __builtin_memcpy(bytes + i * 4, sum, (size_t)count * 4);
            continue;
        }
        uint16_t half[L];
        for (int l = 0; l < L; ++l) half[l] = (uint16_t)(dtype == DType::kBFloat16 ? bf16_of(sum[l]) : f16_of(sum[l]));
        __builtin_memcpy(bytes + i * 2, half, (size_t)count * 2);
    }
}

float read(const void* data, int64_t bytes) {
    const auto* p = static_cast<const unsigned char*>(data);
    V sum[8];
    for (V& part : sum) part = vzero();
    for (int64_t at = 0; at + 8 * L * 4 <= bytes; at += 8 * L * 4) {
        for (int j = 0; j < 8; ++j) sum[j] = vadd(sum[j], F32::load(p + at + j * L * 4));
    }
    for (int j = 1; j < 8; ++j) sum[0] = vadd(sum[0], sum[j]);
    return vsum(sum[0]);
}

#if defined(EMOE_BF16_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace

const Kernels EMOE_KERNELS = {EMOE_ISA_NAME, L,          kManyRegisters ? kMostEncoded : kEncodedRows,
                              kHasPairs,     load_rows,  gate_up,
                              down,          linear,     combine,
                              attend_load,   attend,     attend_store,
                              rms_norm,      fit_affine, fit_symmetric,
                              read};

}  // namespace emoe::cpu
