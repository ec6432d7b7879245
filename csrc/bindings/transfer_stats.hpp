// Counters of a transfer queue as Python sees them, for the queue of the CPU and that of a device.
#pragma once

#include <pybind11/pybind11.h>

#include "core/transfer.hpp"

namespace emoe {

pybind11::dict to_dict(const TransferStats& stats);

}  // namespace emoe
