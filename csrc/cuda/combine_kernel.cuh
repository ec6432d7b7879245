// The sum over a token's ranks, in ascending order, so that it does not depend on which call wrote which rank.
#pragma once

#include "cuda/elements.cuh"

namespace emoe::cuda {

constexpr int kCombineThreads = 256;

template <class W, bool kAdd>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const float* pairs, long long count, int top_k, int hidden_out, W* out) {
    const long long step = static_cast<long long>(gridDim.x) * kCombineThreads;
    for (long long i = static_cast<long long>(blockIdx.x) * kCombineThreads + threadIdx.x; i < count; i += step) {
        const float* at = pairs + i / hidden_out * top_k * hidden_out + i % hidden_out;
        float sum = 0.0F;
        for (int k = 0; k < top_k; ++k) sum += at[static_cast<long long>(k) * hidden_out];
        if constexpr (kAdd) {
            out[i] += sum;
        } else {
            out[i] = from_float<W>(sum);
        }
    }
}

}  // namespace emoe::cuda
