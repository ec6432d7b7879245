// Fake CUDA runtime, second part: memory and copies. Every pointer is checked against the live allocations; fresh,
// freed and arriving memory is poisoned with 0xFF (a NaN in every float type), and a copy arrives in two parts.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <thread>

#include "cudart_internal.hpp"

namespace emu {
namespace {

constexpr unsigned char kPoison = 0xFF;
constexpr std::size_t kGuard = 256;  // behind every allocation; a write there is found when it is freed
constexpr unsigned char kGuardByte = 0xA5;

struct Block {
    std::size_t bytes;
    int device;
};

struct Memory {
    std::mutex mutex;
    std::map<std::uintptr_t, Block> device, pinned;
    std::uint64_t device_bytes = 0, pinned_bytes = 0;
};
Memory& memory() {
    static Memory* const all = new Memory;
    return *all;
}

const Block* inside(const std::map<std::uintptr_t, Block>& blocks, const void* p, std::size_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    auto found = blocks.upper_bound(address);
    if (found == blocks.begin()) return nullptr;
    --found;
    return address + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}

void* obtain(std::size_t bytes, std::size_t alignment) {
    const std::size_t whole = (bytes + kGuard + alignment - 1) / alignment * alignment;
    auto* const p = static_cast<unsigned char*>(std::aligned_alloc(alignment, whole));
    if (p == nullptr) return nullptr;
    std::memset(p, kPoison, bytes);
    std::memset(p + bytes, kGuardByte, kGuard);
    return p;
}

void give_back(void* p, std::size_t bytes) {
    const auto* const guard = static_cast<unsigned char*>(p) + bytes;
    for (std::size_t i = 0; i < kGuard; ++i) {
        if (guard[i] != kGuardByte) die("something wrote behind the end of an allocation");
    }
    std::memset(p, kPoison, bytes);
    std::free(p);
}

// -1: not device memory.
int device_of(const void* p, std::size_t bytes) {
    const Quiet quiet;
    Memory& all = memory();
    const std::lock_guard<std::mutex> guard(all.mutex);
    const Block* const block = inside(all.device, p, bytes);
    return block == nullptr ? -1 : block->device;
}

cudaError_t refuse(const char* what, const void* p, std::size_t bytes) {
    std::fprintf(stderr, "EMU: %s: [%p, %zu bytes)\n", what, p, bytes);
    return returned(cudaErrorInvalidValue);
}

cudaError_t allocate(void** p, std::size_t bytes, std::map<std::uintptr_t, Block> Memory::* blocks,
                     std::uint64_t Memory::* total, std::size_t alignment, std::uint64_t limit) {
    const Quiet quiet;
    Memory& all = memory();
    const std::lock_guard<std::mutex> guard(all.mutex);
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (all.*total + bytes > limit) return returned(cudaErrorMemoryAllocation);
    *p = obtain(bytes, alignment);
    if (*p == nullptr) return returned(cudaErrorMemoryAllocation);
    (all.*blocks)[reinterpret_cast<std::uintptr_t>(*p)] = {bytes, current_device()};
    all.*total += bytes;
    return cudaSuccess;
}

cudaError_t release(void* p, std::map<std::uintptr_t, Block> Memory::* blocks, std::uint64_t Memory::* total) {
    if (p == nullptr) return cudaSuccess;
    std::size_t bytes;
    {
        const Quiet quiet;
        Memory& all = memory();
        const std::lock_guard<std::mutex> guard(all.mutex);
        const auto found = (all.*blocks).find(reinterpret_cast<std::uintptr_t>(p));
        if (found == (all.*blocks).end()) return refuse("freed memory that is not allocated", p, 0);
        bytes = found->second.bytes;
        all.*total -= bytes;
        (all.*blocks).erase(found);
    }
    give_back(p, bytes);  // seen by the sanitizers: a copy still in flight is a race or a use after free
    return cudaSuccess;
}

std::uint64_t limit_of(const char* name) { return static_cast<std::uint64_t>(setting(name, 4096)) << 20; }

}  // namespace

bool is_device(const void* p, std::size_t bytes) { return device_of(p, bytes) >= 0; }
bool is_pinned(const void* p, std::size_t bytes) {
    const Quiet quiet;
    Memory& all = memory();
    const std::lock_guard<std::mutex> guard(all.mutex);
    return inside(all.pinned, p, bytes) != nullptr;
}
std::uint64_t bytes_of_device(int device) {
    const Quiet quiet;
    Memory& all = memory();
    const std::lock_guard<std::mutex> guard(all.mutex);
    std::uint64_t sum = 0;
    for (const auto* blocks : {&all.device, &all.pinned}) {
        for (const auto& [address, block] : *blocks) sum += block.device == device ? block.bytes : 0;
    }
    return sum;
}
std::uint64_t device_bytes() { return memory().device_bytes; }
std::uint64_t pinned_bytes() { return memory().pinned_bytes; }

}  // namespace emu

using emu::returned;

extern "C" {

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    EMU_ENTER(cudaMemGetInfo);
    *total = emu::limit_of("EMU_DEVICE_MIB");
    *free = *total - emu::device_bytes();
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
    EMU_ENTER(cudaMalloc);
    EMU_CHECK(emu::may_allocate());
    return emu::allocate(p, bytes, &emu::Memory::device, &emu::Memory::device_bytes, 256,
                         emu::limit_of("EMU_DEVICE_MIB"));
}
cudaError_t cudaFree(void* p) {
    EMU_CHECK(emu::may_allocate());
    return emu::release(p, &emu::Memory::device, &emu::Memory::device_bytes);
}
cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) {
    EMU_ENTER(cudaHostAlloc);
    EMU_CHECK(emu::may_allocate());
    return emu::allocate(p, bytes, &emu::Memory::pinned, &emu::Memory::pinned_bytes, 4096,
                         emu::limit_of("EMU_PINNED_MIB"));
}
cudaError_t cudaFreeHost(void* p) {
    EMU_CHECK(emu::may_allocate());
    return emu::release(p, &emu::Memory::pinned, &emu::Memory::pinned_bytes);
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    EMU_ENTER(cudaMemcpyAsync);
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    const int target_device = emu::device_of(target, bytes);
    const int source_device = emu::device_of(source, bytes);
    const bool up = kind == cudaMemcpyHostToDevice;
    const bool down = kind == cudaMemcpyDeviceToHost;
    if (!up && !down && kind != cudaMemcpyDeviceToDevice)
        return emu::refuse("kind of copy not modelled", target, bytes);
    if (up || kind == cudaMemcpyDeviceToDevice) {
        if (target_device < 0) return emu::refuse("copy target is not inside one device allocation", target, bytes);
        if (target_device != on->device) return emu::refuse("copy target is on another device", target, bytes);
    }
    if (down || kind == cudaMemcpyDeviceToDevice) {
        if (source_device < 0) return emu::refuse("copy source is not inside one device allocation", source, bytes);
        if (source_device != on->device) return emu::refuse("copy source is on another device", source, bytes);
    }
    // On a GPU an asynchronous copy from pageable memory is legal, and blocks; here it is taken for the mistake it is.
    if (up && !emu::is_pinned(source, bytes)) return emu::refuse("copy source is not pinned", source, bytes);
    if (down && !emu::is_pinned(target, bytes)) return emu::refuse("copy target is not pinned", target, bytes);
    const bool counted = up && !emu::in_capture(on);
    if (counted) emu::count_copy_begin();
    const unsigned longer_us = up ? emu::copy_us() : 0;
    const auto copy = [=] {
        const std::size_t half = bytes / 2;
        auto* const to = static_cast<unsigned char*>(target);
        const auto* const from = static_cast<const unsigned char*>(source);
        std::memset(to, emu::kPoison, bytes);
        if (longer_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(longer_us));
        const auto move = [&] {
            emu::Stream::delay();
            std::memcpy(to, from, half);
            emu::Stream::delay();
            std::memcpy(to + half, from + half, bytes - half);
        };
        if (up) {
            emu::through_engine(on->device, to, bytes, move);
        } else {
            move();
        }
        if (counted) emu::count_copy_end();
    };
    return returned(emu::give(on, copy));
}
cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t stream) {
    EMU_ENTER(cudaMemsetAsync);
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    if (emu::device_of(target, bytes) != on->device) return emu::refuse("memset outside device memory", target, bytes);
    return returned(emu::give(on, [=] { std::memset(target, value, bytes); }));
}

}  // extern "C"
