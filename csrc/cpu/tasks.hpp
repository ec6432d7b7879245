// How a call of the kernels is cut: what the loops of experts and of linear layers have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.hpp"

namespace emoe::cpu {

constexpr std::int64_t kGroupUnits = (12 << 20) / 4;  // of rows that are in the scratch at once
constexpr std::int64_t kSerialElements = 1 << 16;     // below this a parallel loop costs more than it saves
constexpr std::int64_t kColumnTask = 256;  // columns of a task where weights of one input lie side by side: a run of
                                           // several cache lines

inline std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns of one narrow task of encoded rows, which are short: as many as leave some tasks for every thread, since the
// first rows of each are not there yet when they are asked for (14 % between 32 and 256 rows of q4_0 at a depth of
// 2048). `least`: columns of the smallest task; `tasks`: how many of these there are.
inline std::int64_t encoded_task(std::int64_t least, std::int64_t tasks) {
    constexpr std::int64_t kTasksOfThread = 8;
    return least * std::clamp<std::int64_t>(tasks / (kTasksOfThread * threads()), 1, kColumnTask / least);
}

}  // namespace emoe::cpu
