// The AVX-512 (F, BW, DQ, VL) unit. Nothing here may run before the CPU was asked (kernels.cpp).
#include "cpu/kernels.hpp"

#if defined(__x86_64__)
#define EMOE_KERNELS kAvx512Kernels
#define EMOE_ISA_NAME "avx512"

#include "cpu/vectors_avx512.inl"

#include "cpu/integers_avx512.inl"

#include "cpu/kernels.inl"  // uses the vectors
#endif
