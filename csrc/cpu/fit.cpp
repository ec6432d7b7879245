#include "cpu/fit.hpp"

#include <algorithm>
#include <string>

#include "core/error.hpp"
#include "cpu/scratch.hpp"

namespace emoe::cpu {
namespace {

void fit(FitGroups& groups, std::int64_t count, void (*of)(const FitGroups&, std::int64_t, int), int lanes) {
    if (groups.size < 1 || count < 0 || groups.most < 1) {
        throw Error(ErrorKind::kConfig, std::to_string(count) + " groups of " + std::to_string(groups.size) +
                                            " numbers and codes up to " + std::to_string(groups.most) +
                                            ": sizes and codes are at least 1");
    }
    thread_local Scratch scratch;
    groups.scratch = reinterpret_cast<float*>(scratch.take(kFitScratch * groups.size * lanes));
    for (std::int64_t group = 0; group < count; group += lanes) {
        of(groups, group, static_cast<int>(std::min<std::int64_t>(lanes, count - group)));
    }
}

}  // namespace

void fit_affine(const float* numbers, std::int64_t groups, std::int64_t size, int most, float first, int steps,
                float* scale, float* offset, const Kernels& kernels) {
    FitGroups given{numbers, size, most, first, steps, false, nullptr, scale, offset};
    fit(given, groups, kernels.fit_affine, kernels.lanes);
}

void fit_symmetric(const float* numbers, std::int64_t groups, std::int64_t size, int most, bool squared, float* scale,
                   const Kernels& kernels) {
    FitGroups given{numbers, size, most, 0, 0, squared, nullptr, scale, nullptr};
    fit(given, groups, kernels.fit_symmetric, kernels.lanes);
}

}  // namespace emoe::cpu
