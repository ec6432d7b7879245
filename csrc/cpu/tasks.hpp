// How a call of the kernels is cut: what the loops of experts and of linear layers have in common.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.hpp"

namespace emoe::cpu {

constexpr std::int64_t kGroupUnits = (12 << 20) / 4;  // of rows that are in the scratch at once
constexpr std::int64_t kSerialElements = 1 << 16;     // below this a parallel loop costs more than it saves
inline std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns of one narrow task: as many as leave some tasks for every thread. `least`: columns of the smallest task;
// `tasks`: how many of these there are.
//
// Encoded rows are short, and the first of each task are not there yet when they are asked for (14 % between 32 and 256
// rows of q4_0 at a depth of 2048).
inline std::int64_t encoded_task(std::int64_t least, std::int64_t tasks) {
    constexpr std::int64_t kMost = 256;
    constexpr std::int64_t kTasksOfThread = 8;
    return least * std::clamp<std::int64_t>(tasks / (kTasksOfThread * threads()), 1, kMost / least);
}

// The same where weights of one input lie side by side, those of the next in another page (AWQ, H=1024, two threads:
// 47 % of the read bandwidth with 256 columns, 65 % with 512).
constexpr std::int64_t kLeastColumns = 256;
inline std::int64_t column_task(std::int64_t columns, std::int64_t chunks) {
    constexpr std::int64_t kTasksOfThread = 4;
    const std::int64_t tasks = (columns + kLeastColumns - 1) / kLeastColumns * chunks;
    return tasks < 2 * kTasksOfThread * threads() ? kLeastColumns : 2 * kLeastColumns;
}

}  // namespace emoe::cpu
