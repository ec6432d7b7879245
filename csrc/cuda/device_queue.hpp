// Fills slots of a device with records in the background: file -> pinned host memory -> device. A queue as
// core/transfer.hpp is one; here a ticket can also order a compute stream, and then the host does not wait for bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>

#include "core/job_queue.hpp"
#include "core/record.hpp"
#include "core/record_pump.hpp"
#include "core/slab.hpp"
#include "cuda/cuda_backend.hpp"
#include "cuda/pinned_cache.hpp"

namespace emoe::cuda {

struct DeviceQueueStats {
    TransferStats transfer;       // bytes, jobs: of copies to the device, by lane
    std::int64_t file_bytes = 0;  // read from files
    std::int64_t host_hits = 0;   // jobs whose record was in pinned memory
    std::int64_t host_misses = 0;
};

// Every member function may be called from any thread. A device does not survive fork(): in a child every call but
// close() throws BackendUnavailable, and nothing of the device is given back.
class DeviceQueue final : public JobQueue {
  public:
    // `slab` is memory of `backend`. ConfigError; BackendUnavailable where the reader cannot run here.
    DeviceQueue(std::shared_ptr<CudaBackend> backend, std::shared_ptr<const Slab> slab,
                std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader,
                std::shared_ptr<PinnedCache> store, int workers, std::int64_t prefetch_bytes);
    ~DeviceQueue() override;

    // Never blocks. Errors as TransferQueue::submit.
    Ticket submit(std::int64_t record, std::int64_t slot, Lane lane);
    // Only into pinned memory, for computing there; wait() then gives a host slot that is held until release_host().
    Ticket submit_host(std::int64_t record, Lane lane);
    // The copy is over on the device, or the job is over in any other way. Never blocks.
    bool done(Ticket ticket);
    // The copy is in its stream (or the job is over): order_after() would not block. Never blocks.
    bool issued(Ticket ticket);
    // Blocks until the device slot holds the record. Forgets the ticket; ReadError, CancelledError, TransferError.
    // Returns the host slot of submit_host(), -1 for submit().
    std::int64_t wait(Ticket ticket);
    // Blocks only until the copy is in its stream; what `stream` is given from then on runs after it. Forgets the
    // ticket.
    void order_after(Ticket ticket, cudaStream_t stream);
    void release_host(std::int64_t host_slot);
    // Ends every submit_host() and releases every host slot that wait() gave out: for a caller whom an exception took
    // the tickets or the slots from. Blocks while one of them is read.
    void reclaim_host();
    DeviceQueueStats stats();
    // Finishes running jobs, cancels queued ones, joins the workers, waits for copies. Idempotent.
    void close();

  private:
    struct DeviceJob final : Job {
        std::int64_t number = 0;      // of the record
        std::optional<Memory> place;  // none: stops in pinned memory
        std::int64_t host_slot = -1;
        Event copied;
    };

    Ticket enqueue(std::int64_t record, std::optional<std::int64_t> slot, Lane lane);
    void restart() override;
    Ticket copy_at_once(std::unique_lock<std::mutex> lock, const std::shared_ptr<DeviceJob>& job,
                        const PinnedCache::Lease& lease, std::int64_t slot_bytes);
    void work(std::unique_ptr<ReadChannel> channel);
    void perform(DeviceJob& job, RecordPump& pump);
    void fill(const DeviceJob& job, const PinnedCache::Lease& lease, RecordPump& pump);

    std::shared_ptr<CudaBackend> backend_;
    std::shared_ptr<const Slab> slab_;
    std::shared_ptr<const RecordTable> table_;
    std::shared_ptr<Reader> reader_;
    std::shared_ptr<PinnedCache> store_;
    std::unique_ptr<OpenFiles> files_;

    // Guarded by mutex_.
    std::set<std::uint64_t> host_tickets_;  // of submit_host(), not waited for
    std::multiset<std::int64_t> held_;      // host slots that wait() gave out
    int at_once_ = 0;                       // copies that submit() makes now
    int prefetch_workers_ = 0;              // workers busy with one; one worker is always left for demand
    std::int64_t file_bytes_ = 0;
    std::int64_t host_hits_ = 0;
    std::int64_t host_misses_ = 0;
};

}  // namespace emoe::cuda
