// Counters and tickets of a queue as Python sees them, for the queue of the CPU and that of a device.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "core/job_queue.hpp"

namespace emoe {

pybind11::dict to_dict(const TransferStats& stats);

inline std::optional<std::uint64_t> to_number(const std::optional<Ticket>& ticket) {
    return ticket ? std::optional(ticket->id) : std::nullopt;
}

}  // namespace emoe
