// Fork-join loops for the kernels: OpenMP where built with it (shared with torch), else std::thread; also in a child of
// fork(), where OpenMP would wait for a team that is not there.
// Not for transfers; those have their own workers (csrc/core/transfer.hpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "core/error.hpp"
#include "core/fork.hpp"

namespace emoe {

namespace detail {
inline std::atomic<int>& chosen_threads() {
    static std::atomic<int> count{0};  // 0: the default
    return count;
}

// Keeps the first exception of a loop and lets the other threads stop early.
class FirstError {
  public:
    void capture() noexcept {
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_.store(true, std::memory_order_relaxed);
    }
    bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    std::mutex mutex_;
    std::exception_ptr error_;
    std::atomic<bool> failed_{false};
};
}  // namespace detail

// How many threads the next loop uses: set_threads(n), else OpenMP's default or the number of cores.
inline int threads() {
    const int chosen = detail::chosen_threads().load(std::memory_order_relaxed);
    if (chosen > 0) return chosen;
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#endif
}

// For the whole process. ConfigError unless n >= 1.
inline void set_threads(int n) {
    if (n < 1) throw Error(ErrorKind::kConfig, "set_threads(" + std::to_string(n) + "): at least 1 thread is needed");
    detail::chosen_threads().store(n, std::memory_order_relaxed);
}

// Calls fn(i) for i in 0..n-1, dynamically scheduled, and returns when all are done.
// The first exception is rethrown here; indices not yet started are then skipped.
template <typename Fn>
void parallel_for(std::int64_t n, Fn&& fn) {
    const int team = static_cast<int>(std::min<std::int64_t>(threads(), n));
    if (team <= 1) {
        for (std::int64_t i = 0; i < n; ++i) fn(i);
        return;
    }
    detail::FirstError error;
#ifdef _OPENMP
    if (fork_generation() == 0) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (std::int64_t i = 0; i < n; ++i) {
            if (error.failed()) continue;
            try {
                fn(i);
            } catch (...) {
                error.capture();
            }
        }
        error.rethrow();
        return;
    }
#endif
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t i = next++; i < n && !error.failed(); i = next++) {
            try {
                fn(i);
            } catch (...) {
                error.capture();
            }
        }
    };
    std::vector<std::jthread> helpers;
    helpers.reserve(static_cast<std::size_t>(team - 1));
    for (int t = 1; t < team; ++t) helpers.emplace_back(work);
    work();
    helpers.clear();  // joins
    error.rethrow();
}

}  // namespace emoe
