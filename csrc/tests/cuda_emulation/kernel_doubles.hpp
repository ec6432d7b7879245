// Stands in for the kernels where order is tested, not arithmetic: a "kernel" reads its slots slowly, on its stream's
// thread, and writes down what it saw. Included by one file of an executable that links no real kernels.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/kernels.hpp"
#include "tests/cuda_emulation/cudart.hpp"

namespace emoe::cuda {

// The byte that fills [data, data + bytes), or -1 where it is not one byte throughout. Sleeps in the middle.
inline int uniform_byte(const std::byte* data, std::size_t bytes) {
    const auto first = static_cast<int>(data[0]);
    for (std::size_t i = 0; i < bytes; ++i) {
        if (i == bytes / 2) std::this_thread::sleep_for(std::chrono::microseconds(150));
        if (static_cast<int>(data[i]) != first) return -1;
    }
    return first;
}

std::string refusal(const MlpLayout&) { return ""; }
bool supports(const MlpLayout&) noexcept { return true; }
std::size_t workspace_bytes(const Mlp& op) { return static_cast<std::size_t>(op.tokens) * 4096; }

void write_table(std::span<const std::int32_t> slot_of, std::int32_t* table, cudaStream_t stream) {
    emu::enqueue(stream, [values = std::vector(slot_of.begin(), slot_of.end()), table] {
        std::copy(values.begin(), values.end(), table);
    });
}

void route(const Mlp& op, void* workspace, cudaStream_t stream) {
    emu::enqueue(stream, [=] { std::memset(workspace, 0x11, workspace_bytes(op)); });
}

// out[e] becomes the byte that fills the slot of expert e.
void gather_mlp(const Mlp& op, void* workspace, cudaStream_t stream) {
    emu::enqueue(stream, [=] {
        for (std::int64_t e = 0; e < op.experts; ++e) {
            if (op.slot_of[e] < 0) continue;
            const int seen =
                uniform_byte(op.slab + op.slot_of[e] * op.slot_bytes, static_cast<std::size_t>(op.slot_bytes));
            const bool scratch = uniform_byte(static_cast<std::byte*>(workspace), workspace_bytes(op)) == 0x11;
            op.out[e] = scratch ? static_cast<float>(seen) : -2.0F;
        }
    });
}

void combine(const float*, std::int64_t, std::int64_t, std::int64_t, void*, DType, bool, cudaStream_t) {}

}  // namespace emoe::cuda
