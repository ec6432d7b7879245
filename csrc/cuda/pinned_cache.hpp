// The middle tier: records in equal slots of pinned host memory, filled from files, copied to devices. With a slot for
// every record nothing is read twice; with fewer, the least recently used record that nobody uses makes room.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cuda/runtime.hpp"

namespace emoe::cuda {

// Thread-safe. A slot is empty, loading (one thread fills it) or ready; a slot with users is never given away.
class PinnedCache {
  public:
    PinnedCache(std::int64_t slots, std::int64_t slot_bytes, int device = 0);  // ConfigError, BudgetError
    PinnedCache(const PinnedCache&) = delete;
    PinnedCache& operator=(const PinnedCache&) = delete;

    struct Lease {
        std::int64_t slot = -1;
        std::byte* data = nullptr;
        bool fill = false;  // the caller has to fill the slot, then call filled() or failed()
    };

    std::int64_t slots() const noexcept { return static_cast<std::int64_t>(slots_.size()); }
    std::int64_t slot_bytes() const noexcept { return slot_bytes_; }
    std::byte* data() const noexcept { return memory_.data(); }

    // A slot that holds `record` or is to be filled with it, used by the caller until release(). Blocks while another
    // thread fills it, while all slots are in use, and until the copies out of a slot that makes room are over.
    // A record that is here and ready; nothing is waited for.
    std::optional<Lease> acquire_ready(std::int64_t record);
    Lease acquire(std::int64_t record);
    void filled(std::int64_t slot);  // ready; the caller goes on using it
    void failed(std::int64_t slot);  // empty again, and no longer the caller's
    // `copied`: a copy out of the slot; the slot is not written before it is over.
    void release(std::int64_t slot, Event copied = {});
    bool holds(std::int64_t record) const;  // ready now; may have made room by the time the caller looks
    std::int64_t used() const;              // slots with users
    void close();                           // acquire() throws ClosedError from now on, also where it blocks

  private:
    enum class State : std::uint8_t { kEmpty, kLoading, kReady };
    struct Slot {
        State state = State::kEmpty;
        std::int64_t record = -1;
        int users = 0;
        std::uint64_t last_use = 0;
        std::vector<Event> copies;  // out of it, that may not be over
    };

    Slot* victim();  // mutex_ held; nullptr: all in use

    const std::int64_t slot_bytes_;
    PinnedBuffer memory_;
    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    std::vector<Slot> slots_;
    std::unordered_map<std::int64_t, std::int64_t> slot_of_;  // record -> slot, loading or ready
    std::uint64_t clock_ = 0;
    bool closed_ = false;
};

}  // namespace emoe::cuda
