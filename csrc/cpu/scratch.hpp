// Memory that a thread of the kernels' caller keeps from one call to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace emoe::cpu {

// Freed with the thread; grows to the most that was asked for.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }
    std::uint32_t* take(std::int64_t units) {
        if (units > units_) {
            std::free(data_);
            units_ = 0;
            data_ =
                static_cast<std::uint32_t*>(std::aligned_alloc(64, static_cast<std::size_t>((units + 15) / 16 * 64)));
            if (data_ == nullptr) throw std::bad_alloc();
            units_ = units;
        }
        return data_;
    }

  private:
    std::uint32_t* data_ = nullptr;
    std::int64_t units_ = 0;
};

}  // namespace emoe::cpu
