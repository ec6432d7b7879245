// Every kernel instance that gather_mlp.cu launches, for compilers that see no launches (NVRTC).
// `scripts/cuda_matrix.py --nvrtc` compares the names with those of nvcc.
#pragma once

#include "cuda/combine_kernel.cuh"
#include "cuda/encoded_kernels.cuh"
#include "cuda/route_kernels.cuh"
#include "cuda/rows_kernel.cuh"
#include "cuda/tiles_kernel.cuh"

namespace emoe::cuda {

#define EMOE_ROWS_INSTANCES(W)                                             \
    template __global__ void rows_kernel<W, false, false, false>(Product); \
    template __global__ void rows_kernel<W, false, false, true>(Product);  \
    template __global__ void rows_kernel<W, false, true, false>(Product);  \
    template __global__ void rows_kernel<W, false, true, true>(Product);   \
    template __global__ void rows_kernel<W, true, false, false>(Product);  \
    template __global__ void rows_kernel<W, true, false, true>(Product);   \
    template __global__ void rows_kernel<W, true, true, false>(Product);   \
    template __global__ void rows_kernel<W, true, true, true>(Product);    \
    template __global__ void combine_kernel<W, false>(const float*, long long, int, int, W*);
EMOE_ROWS_INSTANCES(float)
EMOE_ROWS_INSTANCES(__half)
EMOE_ROWS_INSTANCES(__nv_bfloat16)
#undef EMOE_ROWS_INSTANCES

#define EMOE_TILES_INSTANCES(W)                                      \
    template __global__ void tiles_kernel<W, false, false>(Product); \
    template __global__ void tiles_kernel<W, false, true>(Product);  \
    template __global__ void tiles_kernel<W, true, false>(Product);  \
    template __global__ void tiles_kernel<W, true, true>(Product);   \
    template __global__ void narrow_kernel<W>(const void*, int, long long, W*);
EMOE_TILES_INSTANCES(__half)
EMOE_TILES_INSTANCES(__nv_bfloat16)
#undef EMOE_TILES_INSTANCES

#define EMOE_ENCODED_INSTANCES(D)                                                           \
    template __global__ void encoded_rows_kernel<D, false>(EncodedProduct);                 \
    template __global__ void encoded_rows_kernel<D, true>(EncodedProduct);                  \
    template __global__ void encoded_tiles_kernel<__half, D, false>(EncodedProduct);        \
    template __global__ void encoded_tiles_kernel<__half, D, true>(EncodedProduct);         \
    template __global__ void encoded_tiles_kernel<__nv_bfloat16, D, false>(EncodedProduct); \
    template __global__ void encoded_tiles_kernel<__nv_bfloat16, D, true>(EncodedProduct);
EMOE_ENCODED_INSTANCES(E4M3)
EMOE_ENCODED_INSTANCES(E2M1)
EMOE_ENCODED_INSTANCES(Int4)
EMOE_ENCODED_INSTANCES(Awq)
EMOE_ENCODED_INSTANCES(Gptq)
EMOE_ENCODED_INSTANCES(Q8_0)
EMOE_ENCODED_INSTANCES(Q4_K)
EMOE_ENCODED_INSTANCES(Q6_K)
EMOE_ENCODED_INSTANCES(AnyCodes)
#undef EMOE_ENCODED_INSTANCES

template __global__ void narrow_kernel<float>(const void*, int, long long, float*);
template __global__ void combine_kernel<float, true>(const float*, long long, int, int, float*);

}  // namespace emoe::cuda
