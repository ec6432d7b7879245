#include "core/slab.hpp"

#include <limits>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace emoe {

Slab::Slab(std::shared_ptr<Backend> backend, std::int64_t slots, std::int64_t slot_bytes)
    : backend_(std::move(backend)), slots_(slots), slot_bytes_(0) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max() / 2;
    if (slots < 1 || slot_bytes < 1 || slot_bytes > kMost / slots) {
        throw Error(ErrorKind::kConfig, "Slab(slots=" + std::to_string(slots) +
                                            ", slot_bytes=" + std::to_string(slot_bytes) +
                                            "): both must be positive and fit into memory");
    }
    slot_bytes_ = align_up(slot_bytes, kPageBytes);
    memory_ = backend_->allocate(static_cast<std::size_t>(slots_ * slot_bytes_));
}

Slab::~Slab() { backend_->free(memory_); }

Memory Slab::slot(std::int64_t number) const {
    if (number < 0 || number >= slots_) {
        throw Error(ErrorKind::kConfig,
                    "slot " + std::to_string(number) + " is not one of 0.." + std::to_string(slots_ - 1));
    }
    return {memory_.data + number * slot_bytes_, static_cast<std::size_t>(slot_bytes_), memory_.host};
}

}  // namespace emoe
