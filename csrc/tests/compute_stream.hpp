// A stream of a test's own, as a caller of the CUDA part has one.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/runtime.hpp"

namespace emoe::test {

struct ComputeStream {
    ComputeStream() { cuda::check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "test"); }
    ~ComputeStream() {
        cudaStreamSynchronize(handle);
        cudaStreamDestroy(handle);
    }
    operator cudaStream_t() const { return handle; }
    cudaStream_t handle = nullptr;
};

}  // namespace emoe::test
