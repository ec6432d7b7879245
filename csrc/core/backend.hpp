// One device: its memory and the compute that runs there. The whole interface on one screen; csrc/cpu/cpu_backend.hpp
// and csrc/cuda/cuda_backend.hpp implement it.
#pragma once

#include <cstddef>
#include <string_view>

#include "core/gather_mlp.hpp"

namespace emoe {

struct Memory {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    bool host = true;  // the CPU, and so a file read, may write to `data`
};

class Backend {
  public:
    virtual ~Backend() = default;
    virtual std::string_view name() const noexcept = 0;
    virtual bool supports(const GatherMlp& op) const noexcept = 0;  // asked before gather_mlp
    virtual Memory allocate(std::size_t bytes) = 0;                 // zeroed, page-aligned; BudgetError
    virtual void free(Memory memory) noexcept = 0;
    // Addresses in `op` are this backend's, except slot_of. `stream`: where a device enqueues the work and returns,
    // nullptr for its default; the CPU has none and returns when `out` is written.
    virtual void gather_mlp(const GatherMlp& op, void* stream) = 0;
};

}  // namespace emoe
