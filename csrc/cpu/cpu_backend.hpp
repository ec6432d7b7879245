// The host as a backend: anonymous mappings, memcpy, and the kernels of csrc/cpu. Everything completes at once.
#pragma once

#include "core/backend.hpp"

namespace emoe::cpu {

class CpuBackend final : public Backend {
  public:
    std::string_view name() const noexcept override { return "cpu"; }
    bool supports(const GatherMlp& op) const noexcept override;
    Memory allocate(std::size_t bytes) override;
    void free(Memory memory) noexcept override;
    Ticket copy_async(Memory dst, std::span<const std::byte> src) override;
    bool done(Ticket) const override { return true; }
    void wait(Ticket) override {}
    void order_after(Ticket) override {}
    void gather_mlp(const GatherMlp& op) override;
};

}  // namespace emoe::cpu
