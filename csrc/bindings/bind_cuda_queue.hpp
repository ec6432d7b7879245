// Shared by the two files that bind the CUDA part.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace emoe {

inline cudaStream_t stream_of(std::uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }
void bind_cuda_queue(pybind11::module_& module);

}  // namespace emoe
