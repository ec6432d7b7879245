// One allocation of a backend, cut into equal slots. Who may use which slot is the caller's affair.
#pragma once

#include <cstdint>
#include <memory>

#include "core/backend.hpp"

namespace emoe {

inline constexpr std::int64_t kPageBytes = 4096;  // slots start at multiples of this; so do direct reads

constexpr std::int64_t align_down(std::int64_t value, std::int64_t alignment) { return value - value % alignment; }
constexpr std::int64_t align_up(std::int64_t value, std::int64_t alignment) {
    return align_down(value + alignment - 1, alignment);
}

class Slab {
  public:
    // slot_bytes is rounded up to a multiple of kPageBytes. ConfigError, BudgetError.
    Slab(std::shared_ptr<Backend> backend, std::int64_t slots, std::int64_t slot_bytes);
    ~Slab();
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;

    std::int64_t slots() const noexcept { return slots_; }
    std::int64_t slot_bytes() const noexcept { return slot_bytes_; }
    Memory memory() const noexcept { return memory_; }
    Memory slot(std::int64_t number) const;  // ConfigError outside 0..slots-1
    Backend& backend() const noexcept { return *backend_; }

  private:
    std::shared_ptr<Backend> backend_;
    std::int64_t slots_;
    std::int64_t slot_bytes_;
    Memory memory_;
};

}  // namespace emoe
