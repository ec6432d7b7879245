#include "cuda/device_queue.hpp"

#include <algorithm>
#include <utility>

namespace emoe::cuda {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr std::size_t index(Lane lane) { return static_cast<std::size_t>(lane); }

}  // namespace

DeviceQueue::DeviceQueue(std::shared_ptr<CudaBackend> backend, std::shared_ptr<const Slab> slab,
                         std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader,
                         std::shared_ptr<PinnedCache> store, int workers, std::int64_t prefetch_bytes)
    : backend_(std::move(backend)),
      slab_(std::move(slab)),
      table_(std::move(table)),
      reader_(std::move(reader)),
      store_(std::move(store)),
      files_(std::make_unique<OpenFiles>(table_, reader_)),
      reader_name_(reader_->name()),
      prefetch_bytes_(prefetch_bytes),
      workers_wanted_(workers) {
    if (workers < 2 || workers > 64) {
        throw Error(ErrorKind::kConfig, "workers=" + std::to_string(workers) + " is not in 2..64");
    }
    if (prefetch_bytes < 0) {
        throw Error(ErrorKind::kConfig, "prefetch_bytes=" + std::to_string(prefetch_bytes) + " is negative");
    }
    if (slab_->memory().host) {
        throw Error(ErrorKind::kConfig, "the slab is host memory; a device queue fills slots of a device");
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

DeviceQueue::~DeviceQueue() { close(); }

Ticket DeviceQueue::submit(std::int64_t record, std::int64_t slot, Lane lane) {
    const std::lock_guard lock(mutex_);
    if (closing_) throw Error(ErrorKind::kClosed, "the transfer queue is closed");
    return enqueue(record, slab_->slot(slot), lane);
}

Ticket DeviceQueue::submit_host(std::int64_t record, Lane lane) {
    const std::lock_guard lock(mutex_);
    if (closing_) throw Error(ErrorKind::kClosed, "the transfer queue is closed");
    return enqueue(record, std::nullopt, lane);
}

Ticket DeviceQueue::enqueue(std::int64_t record, std::optional<Memory> slot, Lane lane) {
    auto job = std::make_shared<Job>();
    job->number = record;
    job->record = table_->record(record);
    job->slot = slot;
    job->lane = lane;
    const std::int64_t smallest = slot ? std::min(slab_->slot_bytes(), store_->slot_bytes()) : store_->slot_bytes();
    if (job->record->slot_bytes > smallest) {
        throw Error(ErrorKind::kConfig, "record " + std::to_string(record) + " needs a slot of " +
                                            std::to_string(job->record->slot_bytes) + " bytes, slots have " +
                                            std::to_string(smallest));
    }
    if (lane == Lane::kPrefetch) {
        if (job->record->bytes > prefetch_bytes_ - prefetching_) {
            throw Error(ErrorKind::kQueueFull, "a prefetch of " + std::to_string(job->record->bytes) + " bytes, with " +
                                                   std::to_string(prefetching_) +
                                                   " queued or running, passes the bound of " +
                                                   std::to_string(prefetch_bytes_));
        }
        prefetching_ += job->record->bytes;
    }
    job->id = next_id_++;
    jobs_.emplace(job->id, job);
    lanes_[index(lane)].push_back(job);
    work_.notify_one();
    return {job->id};
}

void DeviceQueue::promote(Ticket ticket) {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    if (!job || job->lane == Lane::kDemand || !take_out(*job)) return;
    prefetching_ -= job->record->bytes;
    job->lane = Lane::kDemand;
    lanes_[index(Lane::kDemand)].push_back(job);
    work_.notify_one();  // the workers may all have been idle with only prefetches that had to wait
}

bool DeviceQueue::cancel(Ticket ticket) {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    if (!job || !take_out(*job)) return false;
    end(*job, State::kCancelled, std::nullopt);
    return true;
}

bool DeviceQueue::done(Ticket ticket) const {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    return !job || (job->over() && job->copied.done());
}

bool DeviceQueue::issued(Ticket ticket) const {
    const std::lock_guard lock(mutex_);
    const JobPtr job = find(ticket);
    return !job || job->over();
}

DeviceQueue::JobPtr DeviceQueue::settle(Ticket ticket) {
    std::unique_lock lock(mutex_);
    JobPtr job = find(ticket);
    if (!job || job->waited_for) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was waited for already");
    }
    job->waited_for = true;
    if (!job->over()) {
        const auto start = Clock::now();
        over_.wait(lock, [&] { return job->over(); });
        stats_.transfer.wait_seconds += seconds_since(start);
    }
    jobs_.erase(ticket.id);
    if (job->state == State::kCancelled) {
        throw Error(ErrorKind::kCancelled, "ticket " + std::to_string(ticket.id) + " was cancelled");
    }
    if (job->state == State::kFailed) throw *job->error;
    return job;
}

std::int64_t DeviceQueue::wait(Ticket ticket) {
    const JobPtr job = settle(ticket);
    const auto start = Clock::now();
    job->copied.synchronize();
    const std::lock_guard lock(mutex_);
    stats_.transfer.wait_seconds += seconds_since(start);
    return job->host_slot;
}

void DeviceQueue::order_after(Ticket ticket, cudaStream_t stream) {
    const JobPtr job = settle(ticket);
    const DeviceScope scope(backend_->device());
    job->copied.before(stream);
}

void DeviceQueue::release_host(std::int64_t host_slot) { store_->release(host_slot); }

DeviceQueueStats DeviceQueue::stats() const {
    const std::lock_guard lock(mutex_);
    DeviceQueueStats result = stats_;
    result.transfer.reader = reader_name_;
    result.transfer.queued = static_cast<std::int64_t>(lanes_[0].size() + lanes_[1].size());
    return result;
}

void DeviceQueue::close() {
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
    if (store_) store_->close();  // a worker may wait for a host slot that its holder will not give back
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    files_.reset();
    table_.reset();
    reader_.reset();
    // Copies may still run: their source is pinned memory of the store, their target the slab.
    if (backend_) backend_->finish_copies();
    slab_.reset();
    store_.reset();
    backend_.reset();
}

DeviceQueue::JobPtr DeviceQueue::find(Ticket ticket) const {
    if (ticket.id == 0 || ticket.id >= next_id_) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was not issued by this queue");
    }
    const auto found = jobs_.find(ticket.id);
    return found == jobs_.end() ? nullptr : found->second;
}

bool DeviceQueue::take_out(Job& job) {
    if (job.state != State::kQueued) return false;
    std::deque<JobPtr>& lane = lanes_[index(job.lane)];
    lane.erase(std::find_if(lane.begin(), lane.end(), [&](const JobPtr& each) { return each.get() == &job; }));
    return true;
}

DeviceQueue::JobPtr DeviceQueue::take() {
    for (std::deque<JobPtr>& lane : lanes_) {
        if (lane.empty()) continue;
        const bool prefetch = &lane == &lanes_[index(Lane::kPrefetch)];
        if (prefetch && prefetch_workers_ >= workers_wanted_ - 1) continue;
        JobPtr job = std::move(lane.front());
        lane.pop_front();
        job->state = State::kRunning;
        prefetch_workers_ += prefetch;
        return job;
    }
    return nullptr;
}

void DeviceQueue::end(Job& job, State state, std::optional<Error> error) {
    if (job.lane == Lane::kPrefetch) prefetching_ -= job.record->bytes;
    if (state == State::kIssued && job.slot) {
        stats_.transfer.bytes[index(job.lane)] += job.record->bytes;
        ++stats_.transfer.jobs[index(job.lane)];
    }
    if (state == State::kFailed) ++stats_.transfer.failed;
    if (state == State::kCancelled) ++stats_.transfer.cancelled;
    job.error = std::move(error);
    job.state = state;
    over_.notify_all();
}

void DeviceQueue::work(std::unique_ptr<ReadChannel> channel) {
    // Transfers go on while another thread captures a graph.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
    cudaThreadExchangeStreamCaptureMode(&mode);
    RecordPump pump(std::move(channel), *files_);
    std::unique_lock lock(mutex_);
    for (;;) {
        JobPtr job;
        work_.wait(lock, [&] { return closing_ || (job = take()) != nullptr; });
        if (!job) return;
        lock.unlock();
        std::optional<Error> error;
        try {
            perform(*job, pump);
        } catch (const Error& thrown) {
            error = thrown;
        } catch (const std::exception& thrown) {
            error = Error(ErrorKind::kTransfer, std::string("a transfer failed: ") + thrown.what());
        }
        lock.lock();
        if (job->lane == Lane::kPrefetch) {
            --prefetch_workers_;
            work_.notify_one();
        }
        end(*job, error ? State::kFailed : State::kIssued, std::move(error));
    }
}

// The job's own fields are this worker's until it is over, except those that promote() and settle() look at.
void DeviceQueue::perform(Job& job, RecordPump& pump) {
    const PinnedCache::Lease lease = store_->acquire(job.number);
    if (lease.fill) fill(job, lease, pump);
    {
        const std::lock_guard lock(mutex_);
        ++(lease.fill ? stats_.host_misses : stats_.host_hits);
    }
    if (!job.slot) {
        job.host_slot = lease.slot;  // stays in use until release_host()
        return;
    }
    const auto bytes = static_cast<std::size_t>(job.record->slot_bytes);
    try {
        job.copied = backend_->copy(*job.slot, {lease.data, bytes}, job.lane);
    } catch (...) {
        store_->release(lease.slot);
        throw;
    }
    store_->release(lease.slot, job.copied);
}

void DeviceQueue::fill(const Job& job, const PinnedCache::Lease& lease, RecordPump& pump) {
    const auto start = Clock::now();
    std::optional<RecordPump::Finished> finished;
    try {
        pump.start(job.id, job.record, {lease.data, static_cast<std::size_t>(store_->slot_bytes())});
        while (!finished) finished = pump.step();
    } catch (...) {
        store_->failed(lease.slot);
        throw;
    }
    const std::lock_guard lock(mutex_);
    stats_.transfer.read_seconds += seconds_since(start);
    if (finished->error) {
        store_->failed(lease.slot);
        throw *finished->error;
    }
    stats_.file_bytes += job.record->bytes;
    store_->filled(lease.slot);
}

}  // namespace emoe::cuda
