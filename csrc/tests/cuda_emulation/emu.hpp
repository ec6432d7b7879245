// CUDA device code on a CPU, for tests: what csrc/cuda/port.cuh includes in place of PTX. A thread of a block is a
// fiber, in a shuffled order with one warp running ahead; shared memory starts as NaN and ends where it was declared;
// warp collectives follow PTX's register layouts; cp.async copies nothing before its wait. It models synchronisation
// and arithmetic, not speed, not bank conflicts, and no two blocks at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include "tests/cuda_emulation/cudart.hpp"

namespace emu {

// Of the fiber that runs.
const uint3& thread_index();
const uint3& block_index();
const dim3& grid_size();

void sync_threads();
void sync_warp();
std::uint32_t ballot(bool value);
std::uint32_t shuffle_xor(std::uint32_t bits, int mask);
void* shared(int id, std::size_t bytes);
void* dynamic_shared();

void mma_m16n8k16(float* c, const std::uint32_t* a, const std::uint32_t* b, bool bf16);
void ldmatrix_x4(std::uint32_t* r, const void* row, bool trans);
void copy_async16(void* shared, const void* global, bool take);
void copy_async_commit();
void copy_async_wait(int left);
void require_aligned16(const void* p, const char* what);

// Runs every block of the grid on the calling thread.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, unsigned seed, const std::function<void()>& body);
// False, with the error noted, where a real launch would be refused.
bool launchable(dim3 grid, dim3 block, std::size_t shared_bytes);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, A... args) {
    if (!launchable(grid, block, shared_bytes)) return;
    const std::tuple<P...> values(static_cast<P>(args)...);
    enqueue(stream, [=, seed = next_seed()] {
        run_grid(grid, block, shared_bytes, seed, [&] { std::apply(kernel, values); });
    });
}

}  // namespace emu

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::emu::thread_index())
#define blockIdx (::emu::block_index())
#define gridDim (::emu::grid_size())
#define __syncthreads() ::emu::sync_threads()
#define __syncwarp() ::emu::sync_warp()
#define EMOE_UNROLL
#define EMOE_UNROLL_BY(count) static_assert((count) > 0);
#define EMOE_SHARED(type, name, count) \
    type* const name = static_cast<type*>(::emu::shared(__COUNTER__, sizeof(type) * static_cast<std::size_t>(count)))
#define EMOE_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emu::dynamic_shared())
#define EMOE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ::emu::launch(kernel, (grid), (block), (shared_bytes), (stream), __VA_ARGS__)

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
// The four bytes of b, a that the nibbles of `select` name; no sign is spread.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (select >> 4 * i & 7U) * 8 & 255U) << 8 * i;
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31U));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __ballot_sync(unsigned, bool value) { return emu::ballot(value); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4);
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = emu::shuffle_xor(bits, mask);
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

namespace emoe::cuda {

template <class W>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const std::uint32_t b[2] = {b0, b1};
    emu::mma_m16n8k16(c, a, b, std::is_same_v<W, __nv_bfloat16>);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) { emu::ldmatrix_x4(r, row, false); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) { emu::ldmatrix_x4(r, row, true); }
inline void copy_async16(void* shared, const void* global, bool take) { emu::copy_async16(shared, global, take); }
inline void copy_async_commit() { emu::copy_async_commit(); }
template <int kLeft>
void copy_async_wait() {
    emu::copy_async_wait(kLeft);
}
inline uint4 load16_once(const void* p) {
    emu::require_aligned16(p, "a 16-byte load");
    uint4 v;
    std::memcpy(&v, p, 16);
    return v;
}

}  // namespace emoe::cuda
