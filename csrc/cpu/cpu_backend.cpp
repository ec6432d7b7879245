#include "cpu/cpu_backend.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "core/error.hpp"
#include "cpu/gather_mlp.hpp"

namespace emoe::cpu {

bool CpuBackend::supports(const GatherMlp& op) const noexcept { return cpu::supports(op.layout); }

Memory CpuBackend::allocate(std::size_t bytes) {
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        throw Error(ErrorKind::kBudget, "the operating system refused " + std::to_string(bytes) +
                                            " bytes of memory: " + std::generic_category().message(errno));
    }
    // Fewer pages to pin for each direct read and fewer TLB misses in the kernels; advice only, so failure is fine.
    ::madvise(data, bytes, MADV_HUGEPAGE);
    return {static_cast<std::byte*>(data), bytes, true};
}

void CpuBackend::free(Memory memory) noexcept {
    if (memory.data != nullptr) ::munmap(memory.data, memory.bytes);
}

void CpuBackend::gather_mlp(const GatherMlp& op, void*) { cpu::gather_mlp(op); }

}  // namespace emoe::cpu
