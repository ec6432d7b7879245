// Fork-join loops for the kernels, on threads of their own (docs/kernels.md, "Threads"). Not for transfers; those have
// their own workers (csrc/core/transfer.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace emoe {

// How many threads the next loop uses, the caller's among them: set_threads(n), else EMOE_THREADS, else
// OMP_NUM_THREADS, else usable_cpus(). ConfigError where EMOE_THREADS is no number from 1 to 1024.
int threads();

// For the whole process, from the next loop on. ConfigError unless n is in 1..1024.
void set_threads(int n);

namespace detail {

using Body = void (*)(void* self, std::int64_t first, std::int64_t end);
void run_loop(std::int64_t n, Body body, void* self);

// Where a thread of a loop stands; tests delay it there.
enum class Step : std::uint8_t { kOpened, kWoken, kClaimed, kDone, kSleeps, kJoins };
using StepHook = void (*)(Step);
void set_step_hook(StepHook hook) noexcept;  // nullptr: none

}  // namespace detail

// Calls fn(i) for i in 0..n-1 and returns when all are done. Indices are handed out as threads become free, each
// thread's in ascending order; the caller takes part, and does all of them where no other thread comes. A loop inside a
// loop, and one that begins while another caller's runs, run in the caller's thread alone.
// The first exception is rethrown here; indices not yet started are then skipped. In a child of fork() threads are made
// anew.
template <typename Fn>
void parallel_for(std::int64_t n, Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    const auto body = [](void* self, std::int64_t first, std::int64_t end) {
        F& each = *static_cast<F*>(self);
        for (std::int64_t i = first; i < end; ++i) each(i);
    };
    detail::run_loop(n, body, const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
}

}  // namespace emoe
