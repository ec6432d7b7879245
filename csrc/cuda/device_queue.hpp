// Fills slots of a device with records in the background: file -> pinned host memory -> device. Two lanes, a few
// workers, tickets, as core/transfer.hpp; here a ticket can also order a compute stream, and then the host does not
// wait for bytes.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/error.hpp"
#include "core/record.hpp"
#include "core/record_pump.hpp"
#include "core/slab.hpp"
#include "core/transfer.hpp"
#include "cuda/cuda_backend.hpp"
#include "cuda/pinned_cache.hpp"

namespace emoe::cuda {

struct DeviceQueueStats {
    TransferStats transfer;       // bytes, jobs: of copies to the device, by lane
    std::int64_t file_bytes = 0;  // read from files
    std::int64_t host_hits = 0;   // jobs whose record was in pinned memory
    std::int64_t host_misses = 0;
};

// Every member function may be called from any thread.
class DeviceQueue {
  public:
    // `slab` is memory of `backend`. ConfigError; BackendUnavailable where the reader cannot run here.
    DeviceQueue(std::shared_ptr<CudaBackend> backend, std::shared_ptr<const Slab> slab,
                std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader,
                std::shared_ptr<PinnedCache> store, int workers, std::int64_t prefetch_bytes);
    ~DeviceQueue();
    DeviceQueue(const DeviceQueue&) = delete;
    DeviceQueue& operator=(const DeviceQueue&) = delete;

    // Never blocks. Errors as TransferQueue::submit.
    Ticket submit(std::int64_t record, std::int64_t slot, Lane lane);
    // Only into pinned memory, for computing there; wait() then gives a host slot that is held until release_host().
    Ticket submit_host(std::int64_t record, Lane lane);
    void promote(Ticket ticket);
    bool cancel(Ticket ticket);
    // The copy is over on the device, or the job is over in any other way. Never blocks.
    bool done(Ticket ticket) const;
    // The copy is in its stream (or the job is over): order_after() would not block. Never blocks.
    bool issued(Ticket ticket) const;
    // Blocks until the device slot holds the record. Forgets the ticket; ReadError, CancelledError, TransferError.
    // Returns the host slot of submit_host(), -1 for submit().
    std::int64_t wait(Ticket ticket);
    // Blocks only until the copy is in its stream; what `stream` is given from then on runs after it. Forgets the
    // ticket.
    void order_after(Ticket ticket, cudaStream_t stream);
    void release_host(std::int64_t host_slot);
    DeviceQueueStats stats() const;
    // Finishes running jobs, cancels queued ones, joins the workers, waits for copies. Idempotent.
    void close();

  private:
    enum class State : std::uint8_t { kQueued, kRunning, kIssued, kFailed, kCancelled };
    struct Job {
        std::uint64_t id = 0;
        std::int64_t number = 0;  // of the record
        std::shared_ptr<const Record> record;
        std::optional<Memory> slot;  // none: stops in pinned memory
        Lane lane = Lane::kDemand;
        State state = State::kQueued;
        std::int64_t host_slot = -1;
        bool waited_for = false;
        Event copied;
        std::optional<Error> error;
        bool over() const { return state != State::kQueued && state != State::kRunning; }
    };
    using JobPtr = std::shared_ptr<Job>;

    Ticket enqueue(std::int64_t record, std::optional<Memory> slot, Lane lane);
    JobPtr settle(Ticket ticket);  // blocks until the job is over, forgets it and throws what it threw
    void work(std::unique_ptr<ReadChannel> channel);
    void perform(Job& job, RecordPump& pump);
    void fill(const Job& job, const PinnedCache::Lease& lease, RecordPump& pump);
    JobPtr take();                                                // mutex_ held
    void end(Job& job, State state, std::optional<Error> error);  // mutex_ held
    JobPtr find(Ticket ticket) const;                             // mutex_ held
    bool take_out(Job& job);                                      // mutex_ held

    std::shared_ptr<CudaBackend> backend_;
    std::shared_ptr<const Slab> slab_;
    std::shared_ptr<const RecordTable> table_;
    std::shared_ptr<Reader> reader_;
    std::shared_ptr<PinnedCache> store_;
    std::unique_ptr<OpenFiles> files_;
    const std::string reader_name_;
    const std::int64_t prefetch_bytes_;
    const int workers_wanted_;

    mutable std::mutex mutex_;  // guards what follows, and the fields of every Job that others look at
    std::condition_variable work_;
    std::condition_variable over_;
    std::array<std::deque<JobPtr>, 2> lanes_;
    std::unordered_map<std::uint64_t, JobPtr> jobs_;  // by ticket, until waited for
    std::uint64_t next_id_ = 1;
    std::int64_t prefetching_ = 0;  // bytes of prefetches that are queued or running
    int prefetch_workers_ = 0;      // workers busy with one; one worker is always left for demand
    bool closing_ = false;
    DeviceQueueStats stats_;

    std::mutex close_mutex_;
    std::vector<std::thread> workers_;
};

}  // namespace emoe::cuda
