// Fills slots with records in the background: two lanes, a few workers, tickets. docs/transfer.md draws it.
// Decides nothing about which record goes where; that a slot is used once at a time is the caller's promise.
#pragma once

#include <cstdint>
#include <memory>

#include "core/backend.hpp"
#include "core/job_queue.hpp"
#include "core/reader.hpp"
#include "core/record.hpp"
#include "core/record_pump.hpp"
#include "core/slab.hpp"

namespace emoe {

// Every member function may be called from any thread.
class TransferQueue final : public JobQueue {
  public:
    // ConfigError; BackendUnavailable where the slab is not host memory or the reader cannot run here.
    TransferQueue(std::shared_ptr<const Slab> slab, std::shared_ptr<const RecordTable> table,
                  std::shared_ptr<Reader> reader, int workers, std::int64_t prefetch_bytes);
    ~TransferQueue() override;

    // Never blocks. ConfigError for an unknown record or slot, or a slot too small; ClosedError; QueueFullError where a
    // prefetch would bring the prefetches that are queued or running over prefetch_bytes.
    Ticket submit(std::int64_t record, std::int64_t slot, Lane lane);
    bool done(Ticket ticket);  // over in any way; never blocks
    // Returns when the slot holds the record; throws ReadError or CancelledError. Forgets the ticket either way, so a
    // second wait throws TransferError, as does one while another thread waits for the same ticket.
    void wait(Ticket ticket);
    TransferStats stats();
    // Finishes running jobs, cancels queued ones, joins the workers, lets go of slab, table and files. Idempotent.
    void close();

  private:
    struct SlotJob final : Job {
        Memory place;
    };

    void restart() override;
    void work(std::unique_ptr<ReadChannel> channel);

    std::shared_ptr<const Slab> slab_;
    std::shared_ptr<const RecordTable> table_;
    std::shared_ptr<Reader> reader_;
    std::unique_ptr<OpenFiles> files_;
    int idle_ = 0;  // workers waiting for work_; mutex_ guards it
};

}  // namespace emoe
