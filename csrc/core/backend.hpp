// One device: its memory, copies into it, and the compute that runs there. The whole interface on one screen;
// csrc/cpu/cpu_backend.hpp implements it. Completion is a value (Ticket), never a callback.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "core/gather_mlp.hpp"

namespace emoe {

struct Memory {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    bool host = true;  // the CPU, and so a file read, may write to `data`
};

// Names one piece of work that completes later; means something only to the object that issued it.
struct Ticket {
    std::uint64_t id = 0;
};

class Backend {
  public:
    virtual ~Backend() = default;
    virtual std::string_view name() const noexcept = 0;
    virtual bool supports(const GatherMlp& op) const noexcept = 0;  // asked before gather_mlp
    virtual Memory allocate(std::size_t bytes) = 0;                 // zeroed, page-aligned; BudgetError
    virtual void free(Memory memory) noexcept = 0;
    virtual Ticket copy_async(Memory dst, std::span<const std::byte> src) = 0;  // src stays valid until done
    virtual bool done(Ticket ticket) const = 0;                                 // never blocks
    virtual void wait(Ticket ticket) = 0;                                       // blocks the calling thread
    virtual void order_after(Ticket ticket) = 0;       // later compute waits, the host does not
    virtual void gather_mlp(const GatherMlp& op) = 0;  // op.slab is memory of this backend
};

}  // namespace emoe
