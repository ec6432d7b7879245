// Scales of groups: every unit against a search in fp64, and groups that have no scale.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "cpu/fit.hpp"
#include "cpu/gather_mlp.hpp"
#include "tests/check.hpp"

using namespace emoe;

namespace {

using Numbers = std::vector<float>;

Numbers normal(std::size_t count, float mean, unsigned seed) {
    std::mt19937 random{seed};
    std::normal_distribution<float> draw(mean, 1.0F);
    Numbers made(count);
    for (float& each : made) each = draw(random);
    return made;
}

// Weighted squared error of scale * code - offset with the best code of each number.
double error(const float* x, std::size_t size, double low, double high, double scale, double offset, bool squared) {
    double mean = 0;
    for (std::size_t j = 0; j < size; ++j) mean += double(x[j]) * x[j] / double(size);
    double sum = 0;
    for (std::size_t j = 0; j < size; ++j) {
        const double code = scale == 0 ? 0 : std::clamp(std::nearbyint((x[j] + offset) / scale), low, high);
        const double lost = scale * code - offset - x[j];
        const double weight = low == 0 ? std::sqrt(mean) + std::abs(x[j]) : squared ? double(x[j]) * x[j] : 1.0;
        sum += weight * lost * lost;
    }
    return sum;
}

// The least error of scales (and offsets) on a fine grid around what spans the range.
double least_affine(const float* x, std::size_t size, int most) {
    const auto [low, high] = std::minmax_element(x, x + size);
    const double from = std::min(0.0F, *low);
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= 60; ++i) {
        for (int k = 0; k <= 60; ++k) {
            const double offset = -from * (0.7 + 0.01 * k);
            const double scale = (*high + offset) / most * (0.7 + 0.01 * i);
            least = std::min(least, error(x, size, 0, most, scale, offset, false));
        }
    }
    return least;
}

double least_symmetric(const float* x, std::size_t size, int most, bool squared) {
    const float largest = *std::max_element(x, x + size, [](float a, float b) { return std::abs(a) < std::abs(b); });
    double least = std::numeric_limits<double>::infinity();
    for (int i = -400; i <= 400; ++i) {
        least = std::min(least, error(x, size, -most, most - 1, largest / (most + 0.01 * i), 0, squared));
    }
    return least;
}

template <typename Fn>
void for_each_isa(Fn&& fn) {
    for (const std::string& isa : cpu::available_isas()) fn(cpu::kernels_named(isa));
}

TEST("scales are as good as those of a fine search") {
    // Few candidates miss by a little in one group or another.
    for (const float mean : {0.0F, 2.0F, -2.0F}) {
        for (const std::size_t size : {std::size_t{16}, std::size_t{32}, std::size_t{23}}) {
            constexpr std::size_t kGroups = 37;  // no multiple of the lanes of any unit
            const Numbers x = normal(kGroups * size, mean, 3);
            for_each_isa([&](const cpu::Kernels& kernels) {
                for (const int most : {3, 15, 31}) {
                    Numbers scale(kGroups, -1);
                    Numbers offset(kGroups, -1);
                    const float first = most == 15 ? -1.0F : -0.5F;
                    cpu::fit_affine(x.data(), kGroups, size, most, first, 20, scale.data(), offset.data(), kernels);
                    double found = 0;
                    double least = 0;
                    for (std::size_t g = 0; g < kGroups; ++g) {
                        CHECK(offset[g] >= 0);
                        found += error(&x[g * size], size, 0, most, scale[g], offset[g], false);
                        least += least_affine(&x[g * size], size, most);
                    }
                    CHECK(found <= 1.2 * least);
                }
                for (const int most : {4, 8, 32}) {
                    for (const bool squared : {false, true}) {
                        Numbers scale(kGroups, -1);
                        cpu::fit_symmetric(x.data(), kGroups, size, most, squared, scale.data(), kernels);
                        double found = 0;
                        double least = 0;
                        for (std::size_t g = 0; g < kGroups; ++g) {
                            found += error(&x[g * size], size, -most, most - 1, scale[g], 0, squared);
                            least += least_symmetric(&x[g * size], size, most, squared);
                        }
                        CHECK(found <= 1.2 * least);
                    }
                }
            });
        }
    }
}

TEST("a group gets the same scale wherever it stands") {
    constexpr std::size_t kGroups = 40;
    constexpr std::size_t kSize = 32;
    const Numbers x = normal(kGroups * kSize, 0.5F, 5);
    for_each_isa([&](const cpu::Kernels& kernels) {
        Numbers scale(kGroups), offset(kGroups), symmetric(kGroups);
        cpu::fit_affine(x.data(), kGroups, kSize, 15, -1, 20, scale.data(), offset.data(), kernels);
        cpu::fit_symmetric(x.data(), kGroups, kSize, 8, true, symmetric.data(), kernels);
        for (std::size_t g = 0; g < kGroups; ++g) {
            float one = 0, low = 0, other = 0;
            cpu::fit_affine(&x[g * kSize], 1, kSize, 15, -1, 20, &one, &low, kernels);
            cpu::fit_symmetric(&x[g * kSize], 1, kSize, 8, true, &other, kernels);
            CHECK(one == scale[g]);
            CHECK(low == offset[g]);
            CHECK(other == symmetric[g]);
        }
    });
}

TEST("groups without a range have no scale") {
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const float value : {0.0F, -2.0F}) {
            const Numbers x(3 * 32, value);
            Numbers scale(3, -1), offset(3, -1);
            cpu::fit_affine(x.data(), 3, 32, 15, -1, 20, scale.data(), offset.data(), kernels);
            for (const float each : scale) CHECK(each == 0);
            for (const float each : offset) CHECK(each == -value);
        }
        const Numbers zeros(3 * 32, 0.0F);
        Numbers scale(3, -1);
        cpu::fit_symmetric(zeros.data(), 3, 32, 8, true, scale.data(), kernels);
        for (const float each : scale) CHECK(each == 0);
        Numbers all(32, 0.25F);  // above zero: the range begins at zero
        float one = 0, low = -1;
        cpu::fit_affine(all.data(), 1, 32, 15, -1, 20, &one, &low, kernels);
        CHECK(low == 0);
        CHECK(std::abs(one * std::nearbyint(0.25F / one) - 0.25F) < 1e-6F);
    });
}

TEST("sizes that are none are refused") {
    float scale = 0, offset = 0, x = 1;
    CHECK_ERROR(ErrorKind::kConfig, cpu::fit_affine(&x, 1, 0, 15, -1, 20, &scale, &offset));
    CHECK_ERROR(ErrorKind::kConfig, cpu::fit_affine(&x, -1, 1, 15, -1, 20, &scale, &offset));
    CHECK_ERROR(ErrorKind::kConfig, cpu::fit_symmetric(&x, 1, 1, 0, true, &scale));
}

}  // namespace

EMOE_TEST_MAIN
