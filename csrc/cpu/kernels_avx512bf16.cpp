// The AVX-512 unit with vdpbf16ps for the wide path of bf16 models and with tables of bytes (VBMI) for FP8. Nothing
// here may run before the CPU was asked.
#include "cpu/kernels.hpp"

#if defined(__x86_64__)
#define EMOE_KERNELS kAvx512Bf16Kernels
#define EMOE_ISA_NAME "avx512bf16"
#define EMOE_BF16_PAIRS
#define EMOE_BYTE_TABLES

#include "cpu/vectors_avx512.inl"

#include "cpu/integers_avx512.inl"

#include "cpu/kernels.inl"  // uses the vectors
#endif
