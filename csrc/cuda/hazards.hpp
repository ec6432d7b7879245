// Which events must pass before a range of device memory may be written or read again. The one place where the order
// between copies and kernels is decided; docs/cuda.md draws it. Knows ranges and events, not slots or experts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "cuda/runtime.hpp"

namespace emoe::cuda {

struct Range {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
};

inline Range range_of(const void* data, std::size_t bytes) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    return {begin, begin + bytes};
}

// Thread-safe. The caller keeps before_*() and the matching call after it together: one thread a range at a time.
class Hazards {
  public:
    // Orders `stream` after every write into the range and every read of it that may not be over.
    void before_write(Range range, cudaStream_t stream);
    void wrote(Range range, cudaStream_t stream, Event written);
    // Orders `stream` after every write into the range that may not be over.
    void before_read(Range range, cudaStream_t stream);
    void read(Range range, cudaStream_t stream, Event finished);
    // Forgets what is over.
    void prune();
    std::size_t pending() const;

  private:
    struct Use {
        std::uintptr_t end;
        cudaStream_t stream;
        Event event;
    };
    struct Uses {
        std::multimap<std::uintptr_t, Use> by_begin;
        std::uintptr_t longest = 0;  // of any range, to bound the search for overlaps
    };

    static void order(Uses& uses, Range range, cudaStream_t stream);
    template <typename Of>
    static void drop_covered(Uses& uses, Range range, Of&& of);
    static void add(Uses& uses, Range range, cudaStream_t stream, Event event);

    mutable std::mutex mutex_;
    Uses writes_, reads_;
};

}  // namespace emoe::cuda
