#include "cuda/device_queue.hpp"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace emoe::cuda {

DeviceQueue::DeviceQueue(std::shared_ptr<CudaBackend> backend, std::shared_ptr<const Slab> slab,
                         std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader,
                         std::shared_ptr<PinnedCache> store, int workers, std::int64_t prefetch_bytes)
    : JobQueue(reader->name(), workers, 2, prefetch_bytes),
      backend_(std::move(backend)),
      slab_(std::move(slab)),
      table_(std::move(table)),
      reader_(std::move(reader)),
      store_(std::move(store)),
      files_(std::make_unique<OpenFiles>(table_, reader_)) {
    if (slab_->memory().host) {
        throw Error(ErrorKind::kConfig, "the slab is host memory; a device queue fills slots of a device");
    }
    try {
        restart();
    } catch (...) {
        close();
        throw;
    }
}

DeviceQueue::~DeviceQueue() { close(); }

void DeviceQueue::restart() {
    refuse_lost_device();
    start(*reader_, [this](std::unique_ptr<ReadChannel> channel) { work(std::move(channel)); });
}

Ticket DeviceQueue::submit(std::int64_t record, std::int64_t slot, Lane lane) { return enqueue(record, slot, lane); }

Ticket DeviceQueue::submit_host(std::int64_t record, Lane lane) { return enqueue(record, std::nullopt, lane); }

Ticket DeviceQueue::enqueue(std::int64_t record, std::optional<std::int64_t> slot, Lane lane) {
    auto lock = enter();
    refuse_closed();
    auto job = std::make_shared<DeviceJob>();
    job->number = record;
    job->record = table_->record(record);
    job->lane = lane;
    std::int64_t smallest = store_->slot_bytes();
    if (slot) {
        job->slot = *slot;
        job->place = slab_->slot(*slot);
        smallest = std::min(smallest, slab_->slot_bytes());
    }
    if (slot) {
        const auto lease = lane == Lane::kDemand ? store_->acquire_ready(record) : std::nullopt;
        if (!lease) return push(std::move(lock), std::move(job), record, smallest);
        return copy_at_once(std::move(lock), job, *lease, smallest);
    }
    const Ticket ticket = push(std::move(lock), std::move(job), record, smallest);
    const std::lock_guard again(mutex_);
    host_tickets_.insert(ticket.id);
    return ticket;
}

// What pinned memory holds needs no worker, whose waking would cost more than giving the copy to its stream.
Ticket DeviceQueue::copy_at_once(std::unique_lock<std::mutex> lock, const std::shared_ptr<DeviceJob>& job,
                                 const PinnedCache::Lease& lease, std::int64_t slot_bytes) {
    Ticket ticket;
    ++at_once_;
    try {
        ticket = push(std::move(lock), job, job->number, slot_bytes, true);
    } catch (...) {
        store_->release(lease.slot);
        const std::lock_guard again(mutex_);
        --at_once_;
        throw;
    }
    std::optional<Error> error;
    try {
        const auto bytes = static_cast<std::size_t>(job->record->slot_bytes);
        const std::optional<Event> copied = backend_->copy_now(*job->place, {lease.data, bytes});
        if (!copied) {  // it would have to wait for room
            store_->release(lease.slot);
            leave_to_worker(job);
            const std::lock_guard again(mutex_);
            --at_once_;
            finished_.notify_all();
            return ticket;
        }
        job->copied = *copied;
        store_->release(lease.slot, *copied);
    } catch (const Error& thrown) {
        error = thrown;
        store_->release(lease.slot);
    }
    {
        const std::lock_guard again(mutex_);
        --at_once_;
        host_hits_ += !error;
        end(*job, error ? State::kFailed : State::kReady, std::move(error));
    }
    finished_.notify_all();
    return ticket;
}

bool DeviceQueue::done(Ticket ticket) {
    const auto lock = enter();
    const auto job = std::static_pointer_cast<DeviceJob>(find(ticket));
    return !job || (job->over() && job->copied.done());
}

bool DeviceQueue::issued(Ticket ticket) {
    const auto lock = enter();
    const JobPtr job = find(ticket);
    return !job || job->over();
}

std::int64_t DeviceQueue::wait(Ticket ticket) {
    {
        const auto lock = enter();
        host_tickets_.erase(ticket.id);
    }
    const auto job = std::static_pointer_cast<DeviceJob>(settle(ticket));
    const auto start = Clock::now();
    job->copied.synchronize();
    const auto lock = enter();
    stats_.wait_seconds += seconds_since(start);
    if (job->host_slot >= 0) held_.insert(job->host_slot);
    return job->host_slot;
}

void DeviceQueue::order_after(Ticket ticket, cudaStream_t stream) {
    const auto job = std::static_pointer_cast<DeviceJob>(settle(ticket));
    const DeviceScope scope(backend_->device());
    job->copied.before(stream);
}

void DeviceQueue::release_host(std::int64_t host_slot) {
    {
        const auto lock = enter();
        const auto held = held_.find(host_slot);
        if (held == held_.end()) {
            throw Error(ErrorKind::kTransfer, "host slot " + std::to_string(host_slot) + " is not held");
        }
        held_.erase(held);
    }
    store_->release(host_slot);
}

void DeviceQueue::reclaim_host() {
    // Slots go back as they come: a job that runs may wait for one of them.
    const auto release_held = [this] {
        std::multiset<std::int64_t> slots;
        {
            const auto lock = enter();
            slots.swap(held_);
        }
        for (const std::int64_t slot : slots) store_->release(slot);
    };
    std::set<std::uint64_t> tickets;
    {
        const auto lock = enter();
        tickets = host_tickets_;
    }
    release_held();
    for (const std::uint64_t ticket : tickets) {
        try {
            cancel({ticket});
            wait({ticket});
        } catch (const Error&) {
            // Cancelled, failed, or waited for by somebody else: it holds nothing of ours.
        }
        release_held();
    }
}

DeviceQueueStats DeviceQueue::stats() {
    const auto lock = enter();
    return {counters(), file_bytes_, host_hits_, host_misses_};
}

void DeviceQueue::close() {
    const auto one_at_a_time = begin_close();
    if (forked()) {
        // Locks of the cache and of the device may be those of threads that are not here: they are not touched again.
        stop();
        static auto* const lost = new std::vector<
            std::tuple<std::shared_ptr<CudaBackend>, std::shared_ptr<const Slab>, std::shared_ptr<PinnedCache>>>;
        lost->emplace_back(std::move(backend_), std::move(slab_), std::move(store_));
        return;
    }
    stop([this] {
        if (store_) store_->close();  // a worker may wait for a host slot that its holder will not give back
    });
    {
        std::unique_lock<std::mutex> lock(mutex_);
        finished_.wait(lock, [this] { return at_once_ == 0; });
    }
    files_.reset();
    table_.reset();
    reader_.reset();
    // Copies may still run: their source is pinned memory of the store, their target the slab.
    if (backend_) backend_->finish_copies();
    slab_.reset();
    store_.reset();
    backend_.reset();
}

void DeviceQueue::work(std::unique_ptr<ReadChannel> channel) {
    // Transfers go on while another thread captures a graph.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
    cudaThreadExchangeStreamCaptureMode(&mode);
    RecordPump pump(std::move(channel), *files_);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        std::shared_ptr<DeviceJob> job;
        work_.wait(lock, [&] {
            if (closing_) return true;
            job = std::static_pointer_cast<DeviceJob>(take(prefetch_workers_ < worker_count_ - 1));
            return job != nullptr;
        });
        if (!job) return;
        const bool prefetch = job->lane == Lane::kPrefetch;
        prefetch_workers_ += prefetch;
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
        if (prefetch) {
            --prefetch_workers_;
            work_.notify_one();
        }
        end(*job, error ? State::kFailed : State::kReady, std::move(error));
        if (job->waited_for) finished_.notify_all();
    }
}

// The job's own fields are this worker's until it is over, except those that promote() and settle() look at.
void DeviceQueue::perform(DeviceJob& job, RecordPump& pump) {
    const PinnedCache::Lease lease = store_->acquire(job.number);
    if (lease.fill) fill(job, lease, pump);
    {
        const std::lock_guard lock(mutex_);
        ++(lease.fill ? host_misses_ : host_hits_);
    }
    if (!job.place) {
        job.host_slot = lease.slot;  // stays in use until release_host()
        return;
    }
    const auto bytes = static_cast<std::size_t>(job.record->slot_bytes);
    try {
        job.copied = backend_->copy(*job.place, {lease.data, bytes}, job.lane);
    } catch (...) {
        store_->release(lease.slot);
        throw;
    }
    store_->release(lease.slot, job.copied);
}

void DeviceQueue::fill(const DeviceJob& job, const PinnedCache::Lease& lease, RecordPump& pump) {
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
    stats_.read_seconds += seconds_since(start);
    if (finished->error) {
        store_->failed(lease.slot);
        throw *finished->error;
    }
    file_bytes_ += job.record->bytes;
    store_->filled(lease.slot);
}

}  // namespace emoe::cuda
