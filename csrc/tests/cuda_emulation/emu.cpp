// The fibers of emu.hpp: threads of a block, their barriers, shared memory and a schedule drawn from a seed.
#include "tests/cuda_emulation/emu.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>

#include "tests/cuda_emulation/emu_internal.hpp"

#ifndef __x86_64__
#error "the emulation's switch between fibers is written for x86-64"
#endif

// Saves the callee-saved registers on the stack of `from` and goes on where `to` was left. swapcontext would make two
// system calls a switch.
extern "C" void emu_switch_stack(void** from, void* to);
asm(R"(
.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch_stack, .-emu_switch_stack
)");

namespace emu {

thread_local Lane* current = nullptr;

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::uint64_t kStackEnd = 0x5AFE57AC5AFE57ACULL;
constexpr std::size_t kSharedLimit = 48 << 10;  // of a block, without the opt-in that no kernel here uses

// Fibers that no grid uses, kept for the next one: they are costly to make. Never destroyed, since workers of streams
// may outlive static destructors.
struct Pool {
    std::mutex mutex;
    std::vector<Lane*> idle;
};
Pool& pool() {
    static Pool* const all = new Pool;
    return *all;
}

void switch_to(Lane* lane) {
    Block* const block = lane->block;
    current = lane;
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(lane->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&block->asan_fake, lane->stack, kStackBytes);
#endif
    emu_switch_stack(&block->stack_pointer, lane->stack_pointer);
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(block->asan_fake, nullptr, nullptr);
#endif
    current = nullptr;
}

void lane_main() {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &current->block->asan_bottom, &current->block->asan_size);
#endif
    for (;;) {
        Lane* lane;
        Block* block;
        const std::function<void()>* body;
        {
            const Quiet quiet;
            lane = current;
            block = lane->block;
            body = block->body;
        }
        acquire(block->start);
        (*body)();
        release(block->end);
        {
            const Quiet quiet;
            if (!lane->copies.empty()) die("a thread ends with cp.async not waited for");
            lane->groups.clear();
            lane->state = Lane::kDone;
        }
        to_scheduler();
    }
}

Lane* new_lane() {
    Lane* const lane = new Lane;
    lane->stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
    std::memcpy(lane->stack, &kStackEnd, sizeof kStackEnd);
    void** top = reinterpret_cast<void**>(lane->stack + kStackBytes);
    *--top = nullptr;  // keeps the entry's stack pointer at 8 modulo 16, as after a call
    *--top = reinterpret_cast<void*>(&lane_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    lane->stack_pointer = top;
#ifdef EMU_TSAN
    lane->tsan = __tsan_create_fiber(0);
#endif
    return lane;
}

void check_stack(const Lane* lane) {
    std::uint64_t end;
    std::memcpy(&end, lane->stack, sizeof end);
    if (end != kStackEnd) die("a thread's stack is full");
}

// Runs the ready lanes of one warp, in any order. A warp is often run again at once: so it runs ahead of the others as
// far as barriers let it.
void run_block(Block& block) {
    std::mt19937& random = block.random;
    const auto warps = static_cast<unsigned>(block.warps.size());
    unsigned warp = static_cast<unsigned>(random()) % warps;
    while (block.alive > 0) {
        if (static_cast<unsigned>(random()) % 4 == 0) warp = static_cast<unsigned>(random()) % warps;
        std::vector<Lane*> ready;
        for (unsigned tries = 0; tries < warps && ready.empty(); ++tries) {
            if (tries > 0) warp = (warp + 1) % warps;
            const std::size_t end = std::min<std::size_t>(block.lanes.size(), warp * 32 + 32);
            for (std::size_t i = warp * 32; i < end; ++i) {
                if (block.lanes[i]->state == Lane::kReady) ready.push_back(block.lanes[i]);
            }
        }
        if (ready.empty()) {
            if (block.at_barrier == 0 || block.at_barrier != block.alive) {
                die("deadlock: threads of a block wait at different barriers or warp collectives");
            }
            block.at_barrier = 0;
            for (Lane* lane : block.lanes) {
                if (lane->state == Lane::kBarrier) lane->state = Lane::kReady;
            }
            continue;
        }
        std::shuffle(ready.begin(), ready.end(), random);
        for (Lane* lane : ready) {
            switch_to(lane);
            if (lane->state == Lane::kDone) --block.alive;
        }
    }
    for (const Lane* lane : block.lanes) check_stack(lane);
    for (const Shared& array : block.shared) std::free(array.data);
    block.shared.clear();
    block.shared_bytes = block.dynamic_bytes;
}

}  // namespace

void to_scheduler() {
    Lane* const lane = current;
    Block* const block = lane->block;
#ifdef EMU_TSAN
    __tsan_switch_to_fiber(block->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&lane->asan_fake, block->asan_bottom, block->asan_size);
#endif
    emu_switch_stack(&lane->stack_pointer, block->stack_pointer);
#ifdef EMU_ASAN
    // The lane may have been given to another block meanwhile.
    __sanitizer_finish_switch_fiber(lane->asan_fake, &lane->block->asan_bottom, &lane->block->asan_size);
#endif
}

bool launchable(dim3 grid, dim3 block, std::size_t shared_bytes) {
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    const bool fits = threads >= 1 && threads <= 1024 && grid.x >= 1 && grid.x < (1U << 31) && grid.y >= 1 &&
                      grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 && shared_bytes <= kSharedLimit;
    if (!fits) note_error(cudaErrorInvalidConfiguration);
    return fits;
}

namespace {

void prepare(Block& block, dim3 grid, dim3 block_size, std::size_t shared_bytes, unsigned seed) {
    block.grid = grid;
    block.random.seed(seed);
    block.dynamic_bytes = block.shared_bytes = shared_bytes;
    const std::size_t threads = std::size_t{block_size.x} * block_size.y * block_size.z;
    {
        const std::lock_guard lock(pool().mutex);
        std::vector<Lane*>& idle = pool().idle;
        const auto taken = static_cast<std::ptrdiff_t>(std::min(idle.size(), threads));
        block.lanes.assign(idle.end() - taken, idle.end());
        idle.resize(idle.size() - static_cast<std::size_t>(taken));
    }
    while (block.lanes.size() < threads) block.lanes.push_back(new_lane());
#ifdef EMU_TSAN
    block.tsan = __tsan_get_current_fiber();
#endif
}

void run_blocks(Block& block, dim3 block_size) {
    const dim3 grid = block.grid;
    std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), block.random);
    for (const std::uint64_t b : order) {
        block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                       static_cast<unsigned>(b / grid.x / grid.y)};
        block.alive = static_cast<int>(block.lanes.size());
        block.at_barrier = 0;
        block.warps.assign((block.lanes.size() + 31) / 32, Warp{});
        // Which fiber is which thread changes from block to block: ThreadSanitizer orders what one fiber does.
        std::shuffle(block.lanes.begin(), block.lanes.end(), block.random);
        for (unsigned t = 0; t < block.lanes.size(); ++t) {
            Lane& lane = *block.lanes[t];
            lane.block = &block;
            lane.id = static_cast<int>(t);
            lane.index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
            lane.state = Lane::kReady;
            lane.barriers = lane.warp_barriers = 0;
            block.warps[t / 32].size = std::min<int>(32, static_cast<int>(block.lanes.size()) - lane.id / 32 * 32);
        }
        run_block(block);
    }
}

}  // namespace

void run_grid(dim3 grid, dim3 block_size, std::size_t shared_bytes, unsigned seed, const std::function<void()>& body) {
    Block* block;
    {
        const Quiet quiet;
        block = new Block;
        block->body = &body;
        prepare(*block, grid, block_size, shared_bytes, seed);
    }
    release(block->start);
    {
        const Quiet quiet;
        run_blocks(*block, block_size);
    }
    acquire(block->end);
    const Quiet quiet;
    {
        const std::lock_guard lock(pool().mutex);
        pool().idle.insert(pool().idle.end(), block->lanes.begin(), block->lanes.end());
    }
    delete block;
}

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return current->block->index; }
const dim3& grid_size() { return current->block->grid; }

void sync_threads() {
    Lane* const lane = current;
    SyncVar* here;
    {
        const Quiet quiet;
        here = &lane->block->barrier[lane->barriers++ % 2];
    }
    release(*here);
    {
        const Quiet quiet;
        lane->state = Lane::kBarrier;
        ++lane->block->at_barrier;
        to_scheduler();
    }
    acquire(*here);
}

void sync_warp() {
    Lane* const lane = current;
    SyncVar* here;
    {
        const Quiet quiet;
        here = &lane->block->warps[static_cast<std::size_t>(lane->id / 32)].barrier[lane->warp_barriers++ % 2];
    }
    release(*here);
    collective(Collective::kSync, nullptr, [](void* const*, int) {});
    acquire(*here);
}

void* shared(int id, std::size_t bytes) {
    const Quiet quiet;
    Block& block = *current->block;
    for (const Shared& array : block.shared) {
        if (array.id == id) return array.data;
    }
    if (id >= 0) block.shared_bytes += bytes;
    if (block.shared_bytes > kSharedLimit) die("more than 48 KiB of shared memory in a block");
    void* data = nullptr;
    if (posix_memalign(&data, 128, bytes) != 0) die("no memory for shared arrays");
    std::memset(data, 0xFF, bytes);  // NaN in fp32, bf16 and fp16
    block.shared.push_back({id, data});
    return data;
}

void* dynamic_shared() { return shared(-1, std::max<std::size_t>(current->block->dynamic_bytes, 1)); }

}  // namespace emu
