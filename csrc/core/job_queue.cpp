#include "core/job_queue.hpp"

#include <algorithm>
#include <map>
#include <new>
#include <utility>

namespace emoe {
namespace {

constexpr std::size_t index(Lane lane) { return static_cast<std::size_t>(lane); }

}  // namespace

JobQueue::JobQueue(std::string reader, int workers, int fewest, std::int64_t prefetch_bytes)
    : worker_count_(workers), reader_name_(std::move(reader)), prefetch_bytes_(prefetch_bytes) {
    if (workers < fewest || workers > 64) {
        throw Error(ErrorKind::kConfig,
                    "workers=" + std::to_string(workers) + " is not in " + std::to_string(fewest) + "..64");
    }
    if (prefetch_bytes < 0) {
        throw Error(ErrorKind::kConfig, "prefetch_bytes=" + std::to_string(prefetch_bytes) + " is negative");
    }
}

void JobQueue::start(Reader& reader, const std::function<void(std::unique_ptr<ReadChannel>)>& work) {
    std::vector<std::unique_ptr<ReadChannel>> channels;  // all of them before the first thread: this may throw
    for (int i = 0; i < worker_count_; ++i) channels.push_back(reader.channel());
    for (auto& channel : channels) {
        workers_.emplace_back([work, mine = std::move(channel)]() mutable { work(std::move(mine)); });
    }
}

std::unique_lock<std::mutex> JobQueue::begin_close() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        if (generation_ != fork_generation()) revive();
    }
    return std::unique_lock(close_mutex_);
}

void JobQueue::stop(const std::function<void()>& wake) {
    {
        const std::lock_guard lock(mutex_);
        for (std::deque<JobPtr>& lane : lanes_) {
            for (const JobPtr& job : lane) end(*job, State::kCancelled, std::nullopt);
            lane.clear();
        }
    }
    work_.notify_all();
    finished_.notify_all();
    wake();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
}

std::unique_lock<std::mutex> JobQueue::enter() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (generation_ != fork_generation()) revive();
    return lock;
}

void JobQueue::revive() {
    // The parent's threads are not here: what they were and what they wait on can be neither joined nor destroyed.
    static auto* const lost = new std::vector<std::vector<std::thread>>;  // found by leak checkers
    lost->push_back(std::exchange(workers_, {}));
    ::new (&work_) std::condition_variable;
    ::new (&finished_) std::condition_variable;
    ::new (&close_mutex_) std::mutex;
    std::map<std::uint64_t, JobPtr> unfinished;  // in the order they were submitted
    for (const auto& [id, job] : jobs_) {
        job->waited_for = false;
        if (job->over()) continue;
        job->state = State::kQueued;
        unfinished.emplace(id, job);
    }
    for (std::deque<JobPtr>& lane : lanes_) lane.clear();
    for (const auto& [id, job] : unfinished) lanes_[index(job->lane)].push_back(job);
    if (!closing_) restart();
    generation_ = fork_generation();
}

void JobQueue::refuse_closed() const {
    if (closing_) throw Error(ErrorKind::kClosed, "the transfer queue is closed");
}

Ticket JobQueue::push(std::unique_lock<std::mutex> lock, JobPtr job, std::int64_t number, std::int64_t slot_bytes,
                      bool runs) {
    job->bytes = job->record->bytes;
    if (job->record->slot_bytes > slot_bytes) {
        throw Error(ErrorKind::kConfig, "record " + std::to_string(number) + " needs a slot of " +
                                            std::to_string(job->record->slot_bytes) + " bytes, slots have " +
                                            std::to_string(slot_bytes));
    }
    const bool prefetch = job->lane == Lane::kPrefetch;
    if (prefetch && job->bytes > prefetch_bytes_ - prefetching_) {
        throw Error(ErrorKind::kQueueFull,
                    "a prefetch of " + std::to_string(job->bytes) + " bytes, with " + std::to_string(prefetching_) +
                        " queued or running, passes the bound of " + std::to_string(prefetch_bytes_));
    }
    const Ticket ticket{job->id = next_id_};
    jobs_.emplace(ticket.id, job);
    if (job->slot >= 0) newest_[job->slot] = ticket.id;
    if (runs) {
        job->state = State::kRunning;
    } else {
        lanes_[index(job->lane)].push_back(job);
    }
    if (prefetch) prefetching_ += job->bytes;
    ++next_id_;
    if (runs) return ticket;
    lock.unlock();  // or the worker would wake up to wait for the mutex
    work_.notify_one();
    return ticket;
}

void JobQueue::leave_to_worker(const JobPtr& job) {
    {
        const auto lock = enter();
        job->state = State::kQueued;
        lanes_[index(job->lane)].push_back(job);
        if (closing_) {  // the workers may be gone
            take_out(*job);
            end(*job, State::kCancelled, std::nullopt);
        }
    }
    work_.notify_one();
    finished_.notify_all();
}

void JobQueue::promote(Ticket ticket) {
    {
        const auto lock = enter();
        const JobPtr job = find(ticket);
        if (!job || job->lane == Lane::kDemand || !take_out(*job)) return;
        prefetching_ -= job->bytes;
        job->lane = Lane::kDemand;
        lanes_[index(Lane::kDemand)].push_back(job);
    }
    work_.notify_one();  // the workers may all have been idle with only prefetches that had to wait
}

bool JobQueue::cancel(Ticket ticket) {
    {
        const auto lock = enter();
        const JobPtr job = find(ticket);
        if (!job || !take_out(*job)) return false;
        end(*job, State::kCancelled, std::nullopt);
    }
    finished_.notify_all();
    return true;
}

std::optional<Ticket> JobQueue::ticket_of(std::int64_t slot) {
    const auto lock = enter();
    const auto found = newest_.find(slot);
    return found == newest_.end() ? std::nullopt : std::optional(Ticket{found->second});
}

JobQueue::JobPtr JobQueue::settle(Ticket ticket) {
    auto lock = enter();
    const JobPtr job = find(ticket);
    if (!job || job->waited_for) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was waited for already");
    }
    job->waited_for = true;
    if (!job->over()) {
        const auto start = Clock::now();
        finished_.wait(lock, [&] { return job->over(); });
        stats_.wait_seconds += seconds_since(start);
    }
    jobs_.erase(ticket.id);
    const auto newest = newest_.find(job->slot);
    if (newest != newest_.end() && newest->second == ticket.id) newest_.erase(newest);
    if (job->state == State::kCancelled) {
        throw Error(ErrorKind::kCancelled, "ticket " + std::to_string(ticket.id) + " was cancelled");
    }
    if (job->state == State::kFailed) throw *job->error;
    return job;
}

TransferStats JobQueue::counters() const {
    TransferStats result = stats_;
    result.reader = reader_name_;
    result.queued = queued();
    return result;
}

JobQueue::JobPtr JobQueue::find(Ticket ticket) const {
    if (ticket.id == 0 || ticket.id >= next_id_) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was not issued by this queue");
    }
    const auto found = jobs_.find(ticket.id);
    return found == jobs_.end() ? nullptr : found->second;
}

bool JobQueue::take_out(Job& job) {
    if (job.state != State::kQueued) return false;
    std::deque<JobPtr>& lane = lanes_[index(job.lane)];
    lane.erase(std::find_if(lane.begin(), lane.end(), [&](const JobPtr& each) { return each.get() == &job; }));
    return true;
}

JobQueue::JobPtr JobQueue::take(bool prefetches) {
    for (std::deque<JobPtr>& lane : lanes_) {
        if (lane.empty() || (&lane == &lanes_[index(Lane::kPrefetch)] && !prefetches)) continue;
        JobPtr job = std::move(lane.front());
        lane.pop_front();
        job->state = State::kRunning;
        return job;
    }
    return nullptr;
}

void JobQueue::end(Job& job, State state, std::optional<Error> error) {
    if (job.lane == Lane::kPrefetch) prefetching_ -= job.bytes;
    if (state == State::kReady && job.slot >= 0) {
        stats_.bytes[index(job.lane)] += job.bytes;
        ++stats_.jobs[index(job.lane)];
    }
    if (state == State::kFailed) ++stats_.failed;
    if (state == State::kCancelled) ++stats_.cancelled;
    job.record.reset();
    job.error = std::move(error);
    job.state = state;
}

}  // namespace emoe
