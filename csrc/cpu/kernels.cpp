// Which instruction-set units this CPU can run. Compiled for the baseline CPU: an instruction-set unit must not
// answer for itself, since its own code may use what it asks about.
#include "cpu/kernels.hpp"

#include <cstdlib>
#include <string>

#include "core/error.hpp"
#include "cpu/gather_mlp.hpp"

namespace emoe::cpu {
namespace {

struct Row {
    const Kernels* kernels;
    bool (*runs_here)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() {  // Cooper Lake alone has the first without the last
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi");
}
#endif

constexpr Row kRows[] = {
#if defined(__x86_64__)
    {&kAvx512Bf16Kernels, has_avx512bf16},
    {&kAvx512Kernels, has_avx512},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, [] { return true; }},
};

const Kernels& choose() {
    const char* forced = std::getenv("EMOE_FORCE_ISA");
    if (forced != nullptr) return kernels_named(forced);
    for (const Row& row : kRows) {
        if (row.runs_here()) return *row.kernels;
    }
    return kScalarKernels;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Row& row : kRows) {
        if (row.runs_here()) names.emplace_back(row.kernels->name);
    }
    return names;
}

const Kernels& kernels_named(std::string_view name) {
    std::string known;
    std::string here;
    for (const Row& row : kRows) {
        const std::string its_name = row.kernels->name;
        known += (known.empty() ? "" : ", ") + its_name;
        if (!row.runs_here()) continue;
        if (its_name == name) return *row.kernels;
        here += (here.empty() ? "" : ", ") + its_name;
    }
    const bool exists =
        (", " + known + ", ").find(", " + std::string(name) + ", ") != std::string::npos && !name.empty();
    throw Error(exists ? ErrorKind::kBackendUnavailable : ErrorKind::kConfig,
                exists ? "EMOE_FORCE_ISA=" + std::string(name) + " does not run on this CPU; it has: " + here
                       : "EMOE_FORCE_ISA='" + std::string(name) + "' is not one of: " + known);
}

const Kernels& active_kernels() {
    static const Kernels& kernels = choose();
    return kernels;
}

}  // namespace emoe::cpu
