// The host as a backend: anonymous mappings and the kernels of csrc/cpu.
#pragma once

#include "core/backend.hpp"

namespace emoe::cpu {

class CpuBackend final : public Backend {
  public:
    std::string_view name() const noexcept override { return "cpu"; }
    bool supports(const GatherMlp& op) const noexcept override;
    Memory allocate(std::size_t bytes) override;
    void free(Memory memory) noexcept override;
    void gather_mlp(const GatherMlp& op, void* stream) override;
};

}  // namespace emoe::cpu
