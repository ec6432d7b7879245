// Fills slots with records in the background: two lanes, a few workers, tickets. docs/transfer.md draws it.
// Decides nothing about which record goes where; that a slot is used once at a time is the caller's promise.
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

#include "core/backend.hpp"
#include "core/error.hpp"
#include "core/reader.hpp"
#include "core/record.hpp"
#include "core/record_pump.hpp"
#include "core/slab.hpp"

namespace emoe {

enum class Lane : std::uint8_t { kDemand = 0, kPrefetch = 1 };

struct TransferStats {
    std::array<std::int64_t, 2> bytes{};  // by lane: of jobs that became ready
    std::array<std::int64_t, 2> jobs{};   // likewise
    std::int64_t cancelled = 0;
    std::int64_t failed = 0;
    double read_seconds = 0.0;  // spent by workers reading and scattering, summed over workers
    double wait_seconds = 0.0;  // spent by callers blocked in wait(), summed over callers
    std::string reader;
    std::int64_t queued = 0;
};

// Every member function may be called from any thread.
class TransferQueue {
  public:
    // ConfigError; BackendUnavailable where the slab is not host memory or the reader cannot run here.
    TransferQueue(std::shared_ptr<const Slab> slab, std::shared_ptr<const RecordTable> table,
                  std::shared_ptr<Reader> reader, int workers, std::int64_t prefetch_bytes);
    ~TransferQueue();
    TransferQueue(const TransferQueue&) = delete;
    TransferQueue& operator=(const TransferQueue&) = delete;

    // Never blocks. ConfigError for an unknown record or slot, or a slot too small; ClosedError; QueueFullError where a
    // prefetch would bring the prefetches that are queued or running over prefetch_bytes.
    Ticket submit(std::int64_t record, std::int64_t slot, Lane lane);
    // A queued prefetch joins the end of the demand lane; anything else stays as it is.
    void promote(Ticket ticket);
    // True: it never ran and its slot was not touched. False: it is running or over.
    bool cancel(Ticket ticket);
    bool done(Ticket ticket) const;  // over in any way; never blocks
    // Returns when the slot holds the record; throws ReadError or CancelledError. Forgets the ticket either way, so a
    // second wait throws TransferError, as does one while another thread waits for the same ticket.
    void wait(Ticket ticket);
    TransferStats stats() const;
    // Finishes running jobs, cancels queued ones, joins the workers, lets go of slab, table and files. Idempotent.
    void close();

  private:
    enum class State : std::uint8_t { kQueued, kRunning, kReady, kFailed, kCancelled };
    struct Job {
        std::uint64_t id = 0;
        std::shared_ptr<const Record> record;  // dropped when over
        Memory slot;
        std::int64_t bytes = 0;
        Lane lane = Lane::kDemand;
        State state = State::kQueued;
        bool waited_for = false;
        std::optional<Error> error;
        bool over() const { return state != State::kQueued && state != State::kRunning; }
    };
    using JobPtr = std::shared_ptr<Job>;

    void work(std::unique_ptr<ReadChannel> channel);
    JobPtr take();                                                // mutex_ held
    void end(Job& job, State state, std::optional<Error> error);  // mutex_ held; notify afterwards
    JobPtr find(Ticket ticket) const;  // mutex_ held; nullptr: forgotten; TransferError: unknown
    bool take_out(Job& job);           // mutex_ held; out of its lane, false if it is not there

    std::shared_ptr<const Slab> slab_;
    std::shared_ptr<const RecordTable> table_;
    std::shared_ptr<Reader> reader_;
    std::unique_ptr<OpenFiles> files_;
    const std::string reader_name_;
    const std::int64_t prefetch_bytes_;

    mutable std::mutex mutex_;          // guards all that follows, and the fields of every Job
    std::condition_variable work_;      // a job was queued, or closing_
    std::condition_variable finished_;  // a job is over
    std::array<std::deque<JobPtr>, 2> lanes_;
    std::unordered_map<std::uint64_t, JobPtr> jobs_;  // by ticket, until waited for
    std::uint64_t next_id_ = 1;
    std::int64_t prefetching_ = 0;  // bytes of prefetches that are queued or running
    int idle_ = 0;                  // workers waiting for work_
    bool closing_ = false;
    TransferStats stats_;

    std::mutex close_mutex_;  // one close() at a time; taken before mutex_
    std::vector<std::thread> workers_;
};

}  // namespace emoe
