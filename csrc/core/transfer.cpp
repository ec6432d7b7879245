#include "core/transfer.hpp"

#include <string>
#include <tuple>
#include <utility>

namespace emoe {

TransferQueue::TransferQueue(std::shared_ptr<const Slab> slab, std::shared_ptr<const RecordTable> table,
                             std::shared_ptr<Reader> reader, int workers, std::int64_t prefetch_bytes)
    : JobQueue(reader->name(), workers, 1, prefetch_bytes),
      slab_(std::move(slab)),
      table_(std::move(table)),
      reader_(std::move(reader)),
      files_(std::make_unique<OpenFiles>(table_, reader_)) {
    if (!slab_->memory().host) {
        throw Error(ErrorKind::kBackendUnavailable,
                    "slots of backend '" + std::string(slab_->backend().name()) + "' cannot be read into by the host");
    }
    try {
        restart();
    } catch (...) {
        close();
        throw;
    }
}

TransferQueue::~TransferQueue() { close(); }

void TransferQueue::restart() {
    idle_ = 0;
    start(*reader_, [this](std::unique_ptr<ReadChannel> channel) { work(std::move(channel)); });
}

Ticket TransferQueue::submit(std::int64_t record, std::int64_t slot, Lane lane) {
    auto lock = enter();
    refuse_closed();
    auto job = std::make_shared<SlotJob>();
    job->record = table_->record(record);
    job->place = slab_->slot(slot);
    job->slot = slot;
    job->lane = lane;
    return push(std::move(lock), std::move(job), record, slab_->slot_bytes());
}

bool TransferQueue::done(Ticket ticket) {
    const auto lock = enter();
    const JobPtr job = find(ticket);
    return !job || job->over();
}

void TransferQueue::wait(Ticket ticket) { settle(ticket); }

TransferStats TransferQueue::stats() {
    const auto lock = enter();
    return counters();
}

void TransferQueue::close() {
    const auto one_at_a_time = begin_close();
    stop();
    // Under the lock, so that a child forked meanwhile has them or not; let go of behind it, since they have locks too.
    const auto let_go = [this] {
        const std::lock_guard lock(mutex_);
        return std::tuple(std::move(files_), std::move(slab_), std::move(table_), std::move(reader_));
    }();
}

void TransferQueue::work(std::unique_ptr<ReadChannel> channel) {
    RecordPump pump(std::move(channel), *files_);
    std::unordered_map<std::uint64_t, JobPtr> mine;  // what the pump has
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        if (!pump.busy()) {
            ++idle_;
            work_.wait(lock, [&] { return closing_ || queued() > 0; });
            --idle_;
        }
        // A busy worker takes more, to keep its channel full, only where no idle one is about to take it.
        if (pump.wants_more() && queued() > (pump.busy() ? idle_ : 0)) {
            const auto job = std::static_pointer_cast<SlotJob>(take());
            lock.unlock();
            mine.emplace(job->id, job);
            pump.start(job->id, job->record, std::span(job->place.data, job->place.bytes));
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
            const JobPtr job = std::move(mine.extract(finished->id).mapped());
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
