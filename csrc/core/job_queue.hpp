// What the queues that fill slots share: lanes, tickets, states, bounds and counters. TransferQueue and
// cuda::DeviceQueue are such queues; each says by its own work() how a job is done.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "core/error.hpp"
#include "core/fork.hpp"
#include "core/reader.hpp"
#include "core/record.hpp"

namespace emoe {

// Names one piece of work that completes later; means something only to the object that issued it.
struct Ticket {
    std::uint64_t id = 0;
};

enum class Lane : std::uint8_t { kDemand = 0, kPrefetch = 1 };

struct TransferStats {
    std::array<std::int64_t, 2> bytes{};  // by lane: of jobs for slots that became ready
    std::array<std::int64_t, 2> jobs{};   // likewise
    std::int64_t cancelled = 0;
    std::int64_t failed = 0;
    double read_seconds = 0.0;  // spent by workers reading and scattering, summed over workers
    double wait_seconds = 0.0;  // spent by callers blocked in wait(), summed over callers
    std::string reader;
    std::int64_t queued = 0;
};

using Clock = std::chrono::steady_clock;
inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Every public member function may be called from any thread, and in a child of fork(): there the first call brings the
// queue back. Jobs that were queued or running at the fork are queued, since the parent's reads are none of the
// child's.
class JobQueue {
  public:
    JobQueue(const JobQueue&) = delete;
    JobQueue& operator=(const JobQueue&) = delete;

    // A queued prefetch joins the end of the demand lane; anything else stays as it is.
    void promote(Ticket ticket);
    // True: it never ran and its slot was not touched. False: it is running or over.
    bool cancel(Ticket ticket);
    // The newest job that was submitted for this slot and not waited for. None: no job will write to the slot any more.
    // How a caller that an exception took out of submit() learns its ticket.
    std::optional<Ticket> ticket_of(std::int64_t slot);

  protected:
    enum class State : std::uint8_t { kQueued, kRunning, kReady, kFailed, kCancelled };
    struct Job {
        virtual ~Job() = default;
        std::uint64_t id = 0;
        std::shared_ptr<const Record> record;  // dropped when over
        std::int64_t slot = -1;                // its number; -1: the job fills none
        std::int64_t bytes = 0;
        Lane lane = Lane::kDemand;
        State state = State::kQueued;
        bool waited_for = false;
        std::optional<Error> error;
        bool over() const { return state != State::kQueued && state != State::kRunning; }
    };
    using JobPtr = std::shared_ptr<Job>;

    // ConfigError where workers is not in fewest..64, or prefetch_bytes is negative.
    JobQueue(std::string reader, int workers, int fewest, std::int64_t prefetch_bytes);
    virtual ~JobQueue() = default;  // the workers use the derived queue, whose destructor has stopped them by now

    // mutex_, in a queue that works in this process.
    std::unique_lock<std::mutex> enter();
    // Starts workers anew in a child of fork(), mutex_ held; or throws BackendUnavailable where they cannot work there.
    virtual void restart() = 0;
    bool forked() const noexcept { return birth_ != fork_generation(); }  // in another process than it was made in
    // A thread for each worker, which runs `work` on a channel of its own. Where it throws, stop() is still needed.
    void start(Reader& reader, const std::function<void(std::unique_ptr<ReadChannel>)>& work);
    // How close() begins: nothing is submitted from now on, and one close() at a time goes on while this is held.
    std::unique_lock<std::mutex> begin_close();
    // Cancels what is queued, calls `wake`, joins the workers when they have finished what runs.
    void stop(const std::function<void()>& wake = [] {});

    // Gives the job its ticket and wakes a worker, or leaves it to the caller as one that runs. ConfigError where the
    // record is larger than `slot_bytes`; QueueFullError where a prefetch would bring those that are queued or running
    // over the bound. Unlocks mutex_.
    Ticket push(std::unique_lock<std::mutex> lock, JobPtr job, std::int64_t number, std::int64_t slot_bytes,
                bool runs = false);
    void leave_to_worker(const JobPtr& job);  // one that runs
    void refuse_closed() const;               // ClosedError; mutex_ held
    JobPtr take(bool prefetches = true);      // mutex_ held; the next to run, or nullptr
    std::int64_t queued() const { return static_cast<std::int64_t>(lanes_[0].size() + lanes_[1].size()); }  // likewise
    void end(Job& job, State state, std::optional<Error> error);  // mutex_ held; notify finished_ afterwards
    JobPtr find(Ticket ticket) const;  // mutex_ held; nullptr: forgotten; TransferError: unknown
    // Blocks until the job is over, forgets it and throws what it ended with. TransferError where it was waited for.
    JobPtr settle(Ticket ticket);
    TransferStats counters() const;  // mutex_ held

    const int worker_count_;
    ForkMutex mutex_{ForkMutex::Level::kQueue};  // guards what follows, and the fields of every Job that others look at
    std::condition_variable work_;               // a job was queued, or closing_
    std::condition_variable finished_;           // a job that somebody waits for is over
    bool closing_ = false;
    TransferStats stats_;

  private:
    bool take_out(Job& job);  // mutex_ held; out of its lane, false if it is not there
    void revive();            // mutex_ held

    const std::string reader_name_;
    const std::int64_t prefetch_bytes_;
    std::array<std::deque<JobPtr>, 2> lanes_;
    std::unordered_map<std::uint64_t, JobPtr> jobs_;          // by ticket, until waited for
    std::unordered_map<std::int64_t, std::uint64_t> newest_;  // slot -> ticket, until waited for
    std::uint64_t next_id_ = 1;
    std::int64_t prefetching_ = 0;  // bytes of prefetches that are queued or running
    std::mutex close_mutex_;        // taken before mutex_
    std::vector<std::thread> workers_;
    const std::uint64_t birth_ = fork_generation();
    std::uint64_t generation_ = birth_;  // of the process that workers_ and the conditions above belong to
};

}  // namespace emoe
