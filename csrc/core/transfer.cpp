#include "core/transfer.hpp"

#include <algorithm>
#include <utility>

namespace emoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr std::size_t index(Lane lane) { return static_cast<std::size_t>(lane); }

}  // namespace

TransferQueue::TransferQueue(std::shared_ptr<const Slab> slab, std::shared_ptr<const RecordTable> table,
                             std::shared_ptr<Reader> reader, int workers, std::int64_t prefetch_bytes)
    : slab_(std::move(slab)),
      table_(std::move(table)),
      reader_(std::move(reader)),
      files_(std::make_unique<OpenFiles>(table_, reader_)),
      reader_name_(reader_->name()),
      prefetch_bytes_(prefetch_bytes) {
    if (workers < 1 || workers > 64) {
        throw Error(ErrorKind::kConfig, "workers=" + std::to_string(workers) + " is not in 1..64");
    }
    if (prefetch_bytes < 0) {
        throw Error(ErrorKind::kConfig, "prefetch_bytes=" + std::to_string(prefetch_bytes) + " is negative");
    }
    if (!slab_->memory().host) {
        throw Error(ErrorKind::kBackendUnavailable,
                    "slots of backend '" + std::string(slab_->backend().name()) + "' cannot be read into by the host");
    }
    std::vector<std::unique_ptr<ReadChannel>> channels;  // all of them before the first thread: this may throw
    for (int i = 0; i < workers; ++i) channels.push_back(reader_->channel());
    try {
        for (auto& channel : channels) {
            workers_.emplace_back([this, mine = std::move(channel)]() mutable { work(std::move(mine)); });
        }
    } catch (...) {
        close();
        throw;
    }
}

TransferQueue::~TransferQueue() { close(); }

Ticket TransferQueue::submit(std::int64_t record, std::int64_t slot, Lane lane) {
    std::unique_lock lock(mutex_);
    if (closing_) throw Error(ErrorKind::kClosed, "the transfer queue is closed");
    auto job = std::make_shared<Job>();
    job->record = table_->record(record);
    job->slot = slab_->slot(slot);
    job->bytes = job->record->bytes;
    job->lane = lane;
    if (job->record->slot_bytes > slab_->slot_bytes()) {
        throw Error(ErrorKind::kConfig, "record " + std::to_string(record) + " needs a slot of " +
                                            std::to_string(job->record->slot_bytes) + " bytes, slots have " +
                                            std::to_string(slab_->slot_bytes()));
    }
    if (lane == Lane::kPrefetch) {
        if (job->bytes > prefetch_bytes_ - prefetching_) {
            throw Error(ErrorKind::kQueueFull,
                        "a prefetch of " + std::to_string(job->bytes) + " bytes, with " + std::to_string(prefetching_) +
                            " queued or running, passes the bound of " + std::to_string(prefetch_bytes_));
        }
        prefetching_ += job->bytes;
    }
    job->id = next_id_++;
    jobs_.emplace(job->id, job);
    lanes_[index(lane)].push_back(job);
    lock.unlock();  // or the worker would wake up to wait for the mutex
    work_.notify_one();
    return {job->id};
}

void TransferQueue::promote(Ticket ticket) {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    if (!job || job->lane == Lane::kDemand || !take_out(*job)) return;
    prefetching_ -= job->bytes;
    job->lane = Lane::kDemand;
    lanes_[index(Lane::kDemand)].push_back(job);
}

bool TransferQueue::cancel(Ticket ticket) {
    {
        const std::lock_guard lock(mutex_);
        const JobPtr job = find(ticket);
        if (!job || !take_out(*job)) return false;
        end(*job, State::kCancelled, std::nullopt);
    }
    finished_.notify_all();
    return true;
}

bool TransferQueue::done(Ticket ticket) const {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    return !job || job->over();
}

void TransferQueue::wait(Ticket ticket) {
    std::unique_lock lock(mutex_);
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
    if (job->state == State::kCancelled) {
        throw Error(ErrorKind::kCancelled, "ticket " + std::to_string(ticket.id) + " was cancelled");
    }
    if (job->state == State::kFailed) throw *job->error;
}

TransferStats TransferQueue::stats() const {
    const std::lock_guard lock(mutex_);
    TransferStats result = stats_;
    result.reader = reader_name_;
    result.queued = static_cast<std::int64_t>(lanes_[0].size() + lanes_[1].size());
    return result;
}

void TransferQueue::close() {
    const std::lock_guard one_at_a_time(close_mutex_);
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        for (std::deque<JobPtr>& lane : lanes_) {
            for (const JobPtr& job : lane) end(*job, State::kCancelled, std::nullopt);
            lane.clear();
        }
    }
    work_.notify_all();
    finished_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    // submit() no longer touches these: it sees closing_ first.
    files_.reset();
    slab_.reset();
    table_.reset();
    reader_.reset();
}

TransferQueue::JobPtr TransferQueue::find(Ticket ticket) const {
    if (ticket.id == 0 || ticket.id >= next_id_) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was not issued by this queue");
    }
    const auto found = jobs_.find(ticket.id);
    return found == jobs_.end() ? nullptr : found->second;
}

bool TransferQueue::take_out(Job& job) {
    if (job.state != State::kQueued) return false;
    std::deque<JobPtr>& lane = lanes_[index(job.lane)];
    lane.erase(std::find_if(lane.begin(), lane.end(), [&](const JobPtr& each) { return each.get() == &job; }));
    return true;
}

TransferQueue::JobPtr TransferQueue::take() {
    for (std::deque<JobPtr>& lane : lanes_) {
        if (lane.empty()) continue;
        JobPtr job = std::move(lane.front());
        lane.pop_front();
        job->state = State::kRunning;
        return job;
    }
    return nullptr;
}

void TransferQueue::end(Job& job, State state, std::optional<Error> error) {
    if (job.lane == Lane::kPrefetch) prefetching_ -= job.bytes;
    if (state == State::kReady) {
        stats_.bytes[index(job.lane)] += job.bytes;
        ++stats_.jobs[index(job.lane)];
    }
    if (state == State::kFailed) ++stats_.failed;
    if (state == State::kCancelled) ++stats_.cancelled;
    job.record.reset();
    job.error = std::move(error);
    job.state = state;
}

void TransferQueue::work(std::unique_ptr<ReadChannel> channel) {
    RecordPump pump(std::move(channel), *files_);
    std::unique_lock lock(mutex_);
    for (;;) {
        if (!pump.busy()) {
            ++idle_;
            work_.wait(lock, [&] { return closing_ || !lanes_[0].empty() || !lanes_[1].empty(); });
            --idle_;
        }
        // A busy worker takes more, to keep its channel full, only where no idle one is about to take it.
        const auto queued = static_cast<int>(lanes_[0].size() + lanes_[1].size());
        if (pump.wants_more() && queued > (pump.busy() ? idle_ : 0)) {
            const JobPtr job = take();
            lock.unlock();
            pump.start(job->id, job->record, std::span(job->slot.data, job->slot.bytes));
            lock.lock();
            continue;
        }
        if (!pump.busy()) {
            if (closing_) return;
            continue;
        }
        lock.unlock();
        const auto start = Clock::now();
        std::optional<RecordPump::Finished> finished = pump.step();
        const double seconds = seconds_since(start);
        lock.lock();
        stats_.read_seconds += seconds;
        if (finished) {
            const State state = finished->error ? State::kFailed : State::kReady;
            const JobPtr job = jobs_.at(finished->id);
            end(*job, state, std::move(finished->error));
            if (job->waited_for) {
                lock.unlock();
                finished_.notify_all();
                lock.lock();
            }
        }
    }
}

}  // namespace emoe
