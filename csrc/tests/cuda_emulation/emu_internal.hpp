// Shared by the two halves of the device emulation: fibers and blocks (emu.cpp), warp instructions (emu_warp.cpp).
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "tests/cuda_emulation/emu.hpp"

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#elif __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

struct SyncVar {
    char at = 0;  // its address stands for an order between threads
};
inline void release([[maybe_unused]] SyncVar& here) {
#ifdef EMU_TSAN
    __tsan_release(&here.at);
#endif
}
inline void acquire([[maybe_unused]] SyncVar& here) {
#ifdef EMU_TSAN
    __tsan_acquire(&here.at);
#endif
}

struct Block;

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

// A thread of a block.
struct Lane {
    enum State : std::uint8_t { kReady, kBarrier, kWarp, kDone };
    Block* block = nullptr;
    int id = 0;
    uint3 index{};
    State state = kReady;
    unsigned barriers = 0, warp_barriers = 0;
    std::vector<Copy> copies;         // not done yet, oldest first
    std::vector<std::size_t> groups;  // sizes of the committed groups among them
    char* stack = nullptr;
    void* stack_pointer = nullptr;
    void* tsan = nullptr;
    void* asan_fake = nullptr;
};

enum class Collective : std::uint8_t { kNone, kSync, kBallot, kShuffle, kMma, kLdmatrix, kLdmatrixTrans };

struct Warp {
    Collective what = Collective::kNone;
    int size = 0;
    int arrived = 0;
    void* arguments[32] = {};
    SyncVar barrier[2];
};

struct Shared {
    int id;
    void* data;
};

// The block that runs, and its grid.
struct Block {
    const std::function<void()>* body = nullptr;
    dim3 grid;
    uint3 index{};
    std::vector<Lane*> lanes;
    std::vector<Warp> warps;
    std::vector<Shared> shared;
    std::size_t shared_bytes = 0, dynamic_bytes = 0;
    int alive = 0, at_barrier = 0;
    std::mt19937 random;
    SyncVar start, end, barrier[2];
    void* stack_pointer = nullptr;
    void* tsan = nullptr;
    void* asan_fake = nullptr;
    const void* asan_bottom = nullptr;
    std::size_t asan_size = 0;
};

extern thread_local Lane* current;

void to_scheduler();

// The last lane of the warp to come runs all(arguments, lanes) for all of them. No order of memory comes of it: only
// __syncwarp and __syncthreads give one.
template <class Fn>
void collective(Collective what, void* mine, Fn&& all) {
    const Quiet quiet;
    Lane* const lane = current;
    Warp& warp = lane->block->warps[static_cast<std::size_t>(lane->id / 32)];
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) die("lanes of one warp are at different collectives");
    warp.arguments[lane->id % 32] = mine;
    if (++warp.arrived < warp.size) {
        lane->state = Lane::kWarp;
        to_scheduler();
        return;
    }
    warp.arrived = 0;
    all(static_cast<void* const*>(warp.arguments), warp.size);
    const int base = lane->id / 32 * 32;
    for (int i = 0; i < warp.size; ++i) lane->block->lanes[static_cast<std::size_t>(base + i)]->state = Lane::kReady;
}

}  // namespace emu
