// Any codes of core/codes.hpp, looked up for each eight numbers: what has no instance of its own, and gate and up in
// different codes.
#pragma once

#include "cuda/decode_blocks.cuh"
#include "cuda/decode_planes.cuh"

namespace emoe::cuda {

struct AnyCodes {
    static constexpr bool kColumns = false;
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]);
};

#define EMOE_CODES(kind, Decoder) \
    case Codes::kind:             \
        return Decoder::decode(m, slot, at, k, out);
__device__ __forceinline__ void AnyCodes::decode(const Matrix& m, const unsigned char* slot, int at, int k,
                                                 float (&out)[8]) {
    switch (static_cast<Codes>(m.codes)) {
        EMOE_CODES(kFloat32, Values<float>)
        EMOE_CODES(kFloat16, Values<__half>)
        EMOE_CODES(kBFloat16, Values<__nv_bfloat16>)
        EMOE_CODES(kE4M3, E4M3)
        EMOE_CODES(kE5M2, E5M2)
        EMOE_CODES(kInt8, Int8)
        EMOE_CODES(kUInt8B128, UInt8B128)
        EMOE_CODES(kE2M1, E2M1)
        EMOE_CODES(kE2M1Divided, E2M1)
        EMOE_CODES(kInt4, Int4)
        EMOE_CODES(kAwq, Awq)
        EMOE_CODES(kGptq, Gptq)
        EMOE_CODES(kGptqV2, Gptq)
        EMOE_CODES(kQ8_0, Q8_0)
        EMOE_CODES(kQ4_0, Q4_0)
        EMOE_CODES(kQ4_1, Q4_1)
        EMOE_CODES(kQ5_0, Q5_0)
        EMOE_CODES(kQ5_1, Q5_1)
        EMOE_CODES(kQ2_K, Q2_K)
        EMOE_CODES(kQ3_K, Q3_K)
        EMOE_CODES(kQ4_K, Q4_K)
        EMOE_CODES(kQ5_K, Q5_K)
        EMOE_CODES(kQ6_K, Q6_K)
        EMOE_CODES(kIq4Nl, Iq4Nl)
        EMOE_CODES(kIq4Xs, Iq4Xs)
        case Codes::kIq1S:
        case Codes::kIq1M:
        case Codes::kIq2Xxs:
        case Codes::kIq2Xs:
        case Codes::kIq2S:
        case Codes::kIq3Xxs:
        case Codes::kIq3S:  // refused by plan.cpp
        case Codes::kMxfp4Blocks:
            break;
    }
    Mxfp4Blocks::decode(m, slot, at, k, out);
}
#undef EMOE_CODES

}  // namespace emoe::cuda
