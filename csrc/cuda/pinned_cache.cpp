#include "cuda/pinned_cache.hpp"

#include <string>
#include <utility>

#include "core/error.hpp"
#include "core/slab.hpp"

namespace emoe::cuda {
namespace {

std::size_t checked_bytes(std::int64_t slots, std::int64_t slot_bytes) {
    if (slots < 1 || slot_bytes < 1) {
        throw Error(ErrorKind::kConfig, "a pinned cache of " + std::to_string(slots) + " slots of " +
                                            std::to_string(slot_bytes) + " bytes; both must be at least 1");
    }
    return static_cast<std::size_t>(slots) * static_cast<std::size_t>(slot_bytes);
}

}  // namespace

PinnedCache::PinnedCache(std::int64_t slots, std::int64_t slot_bytes, int device)
    : slot_bytes_(align_up(slot_bytes, kPageBytes)),
      memory_(checked_bytes(slots, slot_bytes_), device),
      slots_(static_cast<std::size_t>(slots)) {}

PinnedCache::Slot* PinnedCache::victim() {
    Slot* found = nullptr;
    for (Slot& slot : slots_) {
        if (slot.state == State::kEmpty) return &slot;
        if (slot.state == State::kLoading || slot.users > 0) continue;
        if (found == nullptr || slot.last_use < found->last_use) found = &slot;
    }
    return found;
}

std::optional<PinnedCache::Lease> PinnedCache::acquire_ready(std::int64_t record) {
    const std::lock_guard lock(mutex_);
    const auto known = slot_of_.find(record);
    if (closed_ || known == slot_of_.end()) return std::nullopt;
    Slot& slot = slots_[static_cast<std::size_t>(known->second)];
    if (slot.state != State::kReady) return std::nullopt;
    ++slot.users;
    slot.last_use = ++clock_;
    return Lease{known->second, memory_.data() + known->second * slot_bytes_, false};
}

PinnedCache::Lease PinnedCache::acquire(std::int64_t record) {
    std::unique_lock lock(mutex_);
    for (;;) {
        if (closed_) throw Error(ErrorKind::kClosed, "the pinned cache is closed");
        Slot* slot = nullptr;
        const auto known = slot_of_.find(record);
        if (known != slot_of_.end()) {
            slot = &slots_[static_cast<std::size_t>(known->second)];
            if (slot->state == State::kReady) {
                ++slot->users;
                slot->last_use = ++clock_;
                return {known->second, memory_.data() + known->second * slot_bytes_, false};
            }
        } else {
            slot = victim();
        }
        if (slot == nullptr || slot->state == State::kLoading) {
            changed_.wait(lock);
            continue;
        }
        const std::int64_t number = slot - slots_.data();
        if (slot->state == State::kReady) slot_of_.erase(slot->record);
        slot->state = State::kLoading;
        slot->record = record;
        slot->users = 1;
        slot->last_use = ++clock_;
        slot_of_.emplace(record, number);
        const std::vector<Event> copies = std::exchange(slot->copies, {});
        lock.unlock();
        try {
            for (const Event& copied : copies) copied.synchronize();  // the host is about to write what they read
        } catch (...) {
            failed(number);
            throw;
        }
        return {number, memory_.data() + number * slot_bytes_, true};
    }
}

void PinnedCache::filled(std::int64_t slot) {
    const std::lock_guard lock(mutex_);
    slots_[static_cast<std::size_t>(slot)].state = State::kReady;
    changed_.notify_all();
}

void PinnedCache::failed(std::int64_t slot) {
    const std::lock_guard lock(mutex_);
    Slot& empty = slots_[static_cast<std::size_t>(slot)];
    slot_of_.erase(empty.record);
    empty = Slot{};
    changed_.notify_all();
}

void PinnedCache::release(std::int64_t slot, Event copied) {
    const std::lock_guard lock(mutex_);
    Slot& used = slots_[static_cast<std::size_t>(slot)];
    if (copied) {
        std::erase_if(used.copies, [](const Event& each) { return each.done(); });
        used.copies.push_back(std::move(copied));
    }
    if (--used.users == 0) changed_.notify_all();
}

bool PinnedCache::holds(std::int64_t record) const {
    const std::lock_guard lock(mutex_);
    const auto known = slot_of_.find(record);
    return known != slot_of_.end() && slots_[static_cast<std::size_t>(known->second)].state == State::kReady;
}

std::int64_t PinnedCache::used() const {
    const std::lock_guard lock(mutex_);
    std::int64_t count = 0;
    for (const Slot& slot : slots_) count += slot.users > 0;
    return count;
}

void PinnedCache::close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
}

}  // namespace emoe::cuda
