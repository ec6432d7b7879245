// The queue over a fake reader: order, promotion, cancelling, the bound, failures, closing, many threads at once.
#include "core/transfer.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "tests/check.hpp"
#include "tests/fake_reader.hpp"

using namespace emoe;
using emoe::test::FakeReader;
using emoe::test::pattern;

namespace {

constexpr std::int64_t kBytes = 8192;  // of a small record; record r is bytes [r, r + 1) * kBytes of one file

struct Fixture {
    explicit Fixture(std::int64_t records = 8, std::int64_t record_bytes = kBytes, std::int64_t slots = 8)
        : slab(std::make_shared<Slab>(std::make_shared<cpu::CpuBackend>(), slots, record_bytes)) {
        const std::int64_t file = table->add_file("/proc/self/exe");
        for (std::int64_t r = 0; r < records; ++r) {
            Piece piece{file, r * record_bytes, record_bytes, "tensor " + std::to_string(r), 0, {}};
            piece.layout = {DType::kUInt8, DType::kUInt8, 1, record_bytes, record_bytes, 1};
            table->add_record({piece});
        }
    }
    TransferQueue& start(int workers = 1, std::int64_t bound = 1 << 20) {
        queue = std::make_unique<TransferQueue>(slab, table, reader, workers, bound);
        return *queue;
    }
    ~Fixture() {
        reader->open_gate();
        queue.reset();
    }
    bool holds(std::int64_t slot, std::int64_t record) const {
        const std::byte* data = slab->slot(slot).data;
        const std::int64_t bytes = table->record(record)->bytes;
        for (std::int64_t i = 0; i < bytes; ++i) {
            if (data[i] != pattern(record * bytes + i)) return false;
        }
        return true;
    }

    std::shared_ptr<FakeReader> reader = std::make_shared<FakeReader>();
    std::shared_ptr<RecordTable> table = std::make_shared<RecordTable>();
    std::shared_ptr<Slab> slab;
    std::unique_ptr<TransferQueue> queue;
};

std::vector<std::int64_t> records_asked(const FakeReader& reader, std::int64_t record_bytes = kBytes) {
    std::vector<std::int64_t> order;
    for (const std::int64_t offset : reader.asked()) {
        if (const std::int64_t r = offset / record_bytes; order.empty() || order.back() != r) order.push_back(r);
    }
    return order;
}

using Order = std::vector<std::int64_t>;

}  // namespace

TEST("demands overtake queued prefetches, and each lane keeps its order") {
    Fixture f;
    f.reader->close_gate();
    TransferQueue& queue = f.start();
    std::vector<Ticket> tickets = {queue.submit(0, 0, Lane::kPrefetch)};
    f.reader->wait_until_asked(1);
    tickets.push_back(queue.submit(1, 1, Lane::kPrefetch));
    tickets.push_back(queue.submit(2, 2, Lane::kPrefetch));
    tickets.push_back(queue.submit(3, 3, Lane::kDemand));
    tickets.push_back(queue.submit(4, 4, Lane::kDemand));
    CHECK_EQ(queue.stats().queued, 4);
    f.reader->open_gate();
    for (const Ticket ticket : tickets) queue.wait(ticket);
    CHECK(records_asked(*f.reader) == (Order{0, 3, 4, 1, 2}));
    for (std::int64_t r = 0; r < 5; ++r) CHECK(f.holds(r, r));
    const TransferStats stats = queue.stats();
    CHECK_EQ(stats.jobs[0], 2);
    CHECK_EQ(stats.jobs[1], 3);
    CHECK_EQ(stats.bytes[0], 2 * kBytes);
    CHECK_EQ(stats.bytes[1], 3 * kBytes);
    CHECK_EQ(stats.queued, 0);
    CHECK_EQ(stats.reader, std::string("fake"));
}

TEST("a promoted prefetch goes to the end of the demand lane and counts as a demand") {
    Fixture f;
    f.reader->close_gate();
    TransferQueue& queue = f.start();
    const Ticket running = queue.submit(0, 0, Lane::kPrefetch);
    f.reader->wait_until_asked(1);
    std::vector<Ticket> tickets;
    for (std::int64_t r = 1; r < 4; ++r) tickets.push_back(queue.submit(r, r, Lane::kPrefetch));
    tickets.push_back(queue.submit(4, 4, Lane::kDemand));
    queue.promote(tickets[2]);
    queue.promote(tickets[2]);  // is a demand by now
    queue.promote(running);     // too late to matter
    f.reader->open_gate();
    queue.wait(running);
    for (const Ticket ticket : tickets) queue.wait(ticket);
    queue.promote(running);  // forgotten
    CHECK(records_asked(*f.reader) == (Order{0, 4, 3, 1, 2}));
    CHECK_EQ(queue.stats().jobs[0], 2);
    CHECK_EQ(queue.stats().jobs[1], 3);
}

TEST("a cancelled job never touches its slot, and one that runs cannot be cancelled") {
    Fixture f;
    f.reader->close_gate();
    TransferQueue& queue = f.start();
    const Ticket running = queue.submit(0, 0, Lane::kDemand);
    f.reader->wait_until_asked(1);
    const Ticket demand = queue.submit(1, 1, Lane::kDemand);
    const Ticket prefetch = queue.submit(2, 2, Lane::kPrefetch);
    CHECK(!queue.cancel(running));
    CHECK(queue.cancel(demand));
    CHECK(queue.cancel(prefetch));
    CHECK(!queue.cancel(prefetch));
    CHECK(queue.done(demand));
    CHECK(!queue.done(running));
    CHECK_ERROR(ErrorKind::kCancelled, queue.wait(demand));
    CHECK_ERROR(ErrorKind::kTransfer, queue.wait(demand));
    f.reader->open_gate();
    queue.wait(running);
    CHECK(!queue.cancel(running));
    CHECK(records_asked(*f.reader) == (Order{0}));
    for (const std::int64_t slot : {1, 2}) {
        const std::byte* data = f.slab->slot(slot).data;
        CHECK(std::all_of(data, data + kBytes, [](std::byte b) { return b == std::byte{0}; }));
    }
    CHECK_EQ(queue.stats().cancelled, 2);
}

TEST("prefetches are bounded in bytes until they end, are cancelled or promoted; demands are not") {
    Fixture f;
    f.reader->close_gate();
    TransferQueue& queue = f.start(1, 2 * kBytes + 100);
    const Ticket running = queue.submit(0, 0, Lane::kPrefetch);
    f.reader->wait_until_asked(1);
    const Ticket queued = queue.submit(1, 1, Lane::kPrefetch);
    CHECK_ERROR(ErrorKind::kQueueFull, queue.submit(2, 2, Lane::kPrefetch));
    const Ticket demand = queue.submit(3, 3, Lane::kDemand);
    CHECK(queue.cancel(queued));
    const Ticket second = queue.submit(2, 2, Lane::kPrefetch);
    CHECK_ERROR(ErrorKind::kQueueFull, queue.submit(4, 4, Lane::kPrefetch));
    queue.promote(second);
    const Ticket third = queue.submit(4, 4, Lane::kPrefetch);
    CHECK_ERROR(ErrorKind::kQueueFull, queue.submit(5, 5, Lane::kPrefetch));
    f.reader->open_gate();
    for (const Ticket ticket : {running, demand, second, third}) queue.wait(ticket);
    const Ticket a = queue.submit(5, 5, Lane::kPrefetch);
    const Ticket b = queue.submit(6, 6, Lane::kPrefetch);
    queue.wait(a);
    queue.wait(b);
    CHECK_ERROR(ErrorKind::kQueueFull, Fixture().start(1, kBytes - 1).submit(0, 0, Lane::kPrefetch));
}

TEST("a ticket is waited for once, and one that was never issued is refused") {
    Fixture f;
    TransferQueue& queue = f.start();
    const Ticket ticket = queue.submit(0, 0, Lane::kDemand);
    queue.wait(ticket);
    CHECK(queue.done(ticket));
    CHECK_ERROR(ErrorKind::kTransfer, queue.wait(ticket));
    for (const std::uint64_t id : {std::uint64_t{0}, ticket.id + 1, ~std::uint64_t{0}}) {
        CHECK_ERROR(ErrorKind::kTransfer, queue.wait({id}));
        CHECK_ERROR(ErrorKind::kTransfer, queue.done({id}));
        CHECK_ERROR(ErrorKind::kTransfer, queue.cancel({id}));
        CHECK_ERROR(ErrorKind::kTransfer, queue.promote({id}));
    }
}

TEST("a failed job carries file, tensor and bytes, leaves others alone, and a second attempt works") {
    Fixture f;
    f.reader->change = [](std::int64_t n, std::int64_t result) { return n == 1 ? -EIO : result; };
    TransferQueue& queue = f.start();
    const Ticket before = queue.submit(0, 0, Lane::kDemand);
    const Ticket failing = queue.submit(1, 1, Lane::kDemand);
    const Ticket after = queue.submit(2, 2, Lane::kDemand);
    queue.wait(before);
    queue.wait(after);
    CHECK(queue.done(failing));
    const Error error = ERROR_OF(queue.wait(failing));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kRead));
    CHECK_EQ(error.file, std::string("/proc/self/exe"));
    CHECK_EQ(error.tensor, std::string("tensor 1"));
    CHECK_EQ(error.offset, kBytes);
    CHECK_EQ(error.nbytes, kBytes);
    CHECK(error.message.find("Input/output error") != std::string::npos);
    queue.wait(queue.submit(1, 1, Lane::kDemand));
    CHECK(f.holds(1, 1));
    CHECK_EQ(queue.stats().failed, 1);
    CHECK_EQ(queue.stats().jobs[0], 3);
}

TEST("a job that failed is over only when none of its reads is in flight") {
    Fixture f(1, 1 << 20, 1);
    f.reader->depth = 4;
    f.reader->alignment = 1;     // read in place, so a late read would hit the slot
    f.reader->file_bytes = 100;  // every read fails
    f.reader->close_gate();
    f.table->add_record([&] {
        std::vector<Piece> pieces;
        for (std::int64_t i = 0; i < 6; ++i) {
            Piece piece{0, i * 100000 + 200, 1000, "part " + std::to_string(i), i * 2000, {}};
            piece.layout = {DType::kUInt8, DType::kUInt8, 1, 1000, 1000, 1};
            pieces.push_back(piece);
        }
        return pieces;
    }());
    TransferQueue& queue = f.start();
    const Ticket ticket = queue.submit(1, 0, Lane::kDemand);
    f.reader->wait_until_asked(4);
    f.reader->let_through(3);
    CHECK(!queue.done(ticket));
    std::thread late([&] { f.reader->let_through(1); });
    CHECK_ERROR(ErrorKind::kRead, queue.wait(ticket));
    late.join();
    CHECK_EQ(f.reader->asked().size(), std::size_t{4});  // nothing was asked for after the failure
}

TEST("interrupted and short reads are asked for again") {
    for (const std::int64_t alignment : {1, 4096}) {
        Fixture f(2, 64 * 1024);
        f.reader->alignment = alignment;
        f.reader->change = [](std::int64_t n, std::int64_t result) -> std::int64_t {
            if (n % 5 == 0) return -EINTR;
            if (n % 5 == 1) return -EAGAIN;
            return n % 5 == 4 || result < 2 ? result : result / 2;
        };
        TransferQueue& queue = f.start();
        queue.wait(queue.submit(0, 0, Lane::kDemand));
        queue.wait(queue.submit(1, 1, Lane::kDemand));
        CHECK(f.holds(0, 0));
        CHECK(f.holds(1, 1));
    }
}

TEST("a truncated file is an error that says what was wanted and what is there") {
    for (const std::int64_t missing : {std::int64_t{1}, kBytes / 2, kBytes}) {
        Fixture f;
        f.reader->file_bytes = 2 * kBytes - missing;
        TransferQueue& queue = f.start();
        const Ticket whole = queue.submit(0, 0, Lane::kDemand);
        const Ticket cut = queue.submit(1, 1, Lane::kDemand);
        queue.wait(whole);
        const Error error = ERROR_OF(queue.wait(cut));
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kRead));
        CHECK_EQ(error.tensor, std::string("tensor 1"));
        CHECK(error.message.find("is truncated") != std::string::npos);
        CHECK(error.message.find("8192 bytes at offset 8192") != std::string::npos);
    }
}

TEST("closing finishes what runs, cancels what is queued, and refuses what comes later") {
    Fixture f;
    f.reader->close_gate();
    TransferQueue& queue = f.start();
    const Ticket running = queue.submit(0, 0, Lane::kDemand);
    f.reader->wait_until_asked(1);
    const Ticket queued = queue.submit(1, 1, Lane::kDemand);
    const Ticket prefetch = queue.submit(2, 2, Lane::kPrefetch);
    std::thread waiter([&] { CHECK_ERROR(ErrorKind::kCancelled, queue.wait(queued)); });
    std::thread closer([&] { queue.close(); });
    waiter.join();  // close() cancelled it although a job still runs
    f.reader->open_gate();
    queue.close();
    closer.join();
    queue.wait(running);
    CHECK(f.holds(0, 0));
    CHECK_ERROR(ErrorKind::kCancelled, queue.wait(prefetch));
    CHECK_ERROR(ErrorKind::kClosed, queue.submit(0, 0, Lane::kDemand));
    CHECK_EQ(queue.stats().cancelled, 2);
    queue.close();
    CHECK_EQ(f.slab.use_count(), 1);  // a closed queue keeps no memory
    CHECK_EQ(f.reader.use_count(), 1);
}

TEST("what cannot be right is refused when it is submitted") {
    Fixture f(1, kBytes, 2);
    Piece piece{0, 0, 3 * kBytes, "large", 0, {}};
    piece.layout = {DType::kUInt8, DType::kUInt8, 1, 3 * kBytes, 3 * kBytes, 1};
    const std::int64_t large = f.table->add_record({piece});
    TransferQueue& queue = f.start();
    for (const std::int64_t record : {std::int64_t{-1}, large, large + 1}) {
        CHECK_ERROR(ErrorKind::kConfig, queue.submit(record, 0, Lane::kDemand));
    }
    for (const std::int64_t slot : {-1, 2}) CHECK_ERROR(ErrorKind::kConfig, queue.submit(0, slot, Lane::kDemand));
    CHECK_ERROR(ErrorKind::kConfig, f.start(0));
    CHECK_ERROR(ErrorKind::kConfig, f.start(1, -1));
}

TEST("small jobs share a channel's depth, but not while another worker is idle") {
    Fixture f;
    f.reader->depth = 4;
    f.reader->close_gate();
    TransferQueue& queue = f.start(1);
    std::vector<Ticket> tickets;
    for (std::int64_t r = 0; r < 6; ++r) tickets.push_back(queue.submit(r, r, Lane::kDemand));
    f.reader->let_through(1);       // whatever the worker saw when it began, after one completion it has seen all
    f.reader->wait_until_asked(5);  // one done, four in flight
    CHECK(records_asked(*f.reader) == (Order{0, 1, 2, 3, 4}));
    f.reader->open_gate();
    for (const Ticket ticket : tickets) queue.wait(ticket);
    for (std::int64_t r = 0; r < 6; ++r) CHECK(f.holds(r, r));
}

TEST("a channel that breaks fails its jobs and every later one, and nothing hangs") {
    Fixture f;
    f.reader->break_channels = true;
    TransferQueue& queue = f.start();
    for (std::int64_t r = 0; r < 4; ++r) {
        const Error error = ERROR_OF(queue.wait(queue.submit(r, r, Lane::kDemand)));
        CHECK_EQ(error.message, std::string("the fake channel broke"));
    }
    CHECK_EQ(queue.stats().failed, 4);
}

TEST("many threads that submit, promote, cancel and wait always find the right bytes or an error") {
    constexpr std::int64_t kThreads = 6;
    constexpr std::int64_t kSlotsEach = 3;
    Fixture f(16, kBytes, kThreads * kSlotsEach);
    f.reader->depth = 3;
    f.reader->newest_first = true;
    f.reader->change = [](std::int64_t n, std::int64_t result) -> std::int64_t {
        if (n % 31 == 7) return -EIO;
        return n % 13 == 5 ? result / 2 : result;
    };
    TransferQueue& queue = f.start(3, 5 * kBytes);
    std::atomic<std::int64_t> ready{0}, cancelled{0}, failed{0}, wrong{0};
    const auto user = [&](std::int64_t t) {
        std::mt19937 random(static_cast<unsigned>(t));
        for (int round = 0; round < 60; ++round) {
            std::vector<std::pair<Ticket, std::int64_t>> mine;  // ticket, record; by slot
            for (std::int64_t s = 0; s < kSlotsEach; ++s) {
                const auto record = static_cast<std::int64_t>(random() % 16);
                const std::int64_t slot = t * kSlotsEach + s;
                try {
                    mine.emplace_back(queue.submit(record, slot, random() % 2 != 0 ? Lane::kDemand : Lane::kPrefetch),
                                      record);
                } catch (const Error& error) {
                    if (error.kind != ErrorKind::kQueueFull) ++wrong;
                    mine.emplace_back(queue.submit(record, slot, Lane::kDemand), record);
                }
            }
            if (random() % 2 != 0) queue.promote(mine[random() % mine.size()].first);
            const std::size_t chosen = random() % mine.size();
            const bool gone = random() % 3 == 0 && queue.cancel(mine[chosen].first);
            for (std::size_t s = 0; s < mine.size(); ++s) {
                try {
                    queue.wait(mine[s].first);
                    ++ready;
                    if (!f.holds(t * kSlotsEach + static_cast<std::int64_t>(s), mine[s].second)) ++wrong;
                    if (gone && s == chosen) ++wrong;
                } catch (const Error& error) {
                    if (error.kind == ErrorKind::kCancelled) {
                        ++cancelled;
                        if (!gone || s != chosen) ++wrong;
                    } else if (error.kind == ErrorKind::kRead) {
                        ++failed;
                    } else {
                        ++wrong;
                    }
                }
            }
        }
    };
    {
        std::vector<std::jthread> threads;
        for (std::int64_t t = 0; t < kThreads; ++t) threads.emplace_back(user, t);
    }
    const TransferStats stats = queue.stats();
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(ready + cancelled + failed, kThreads * kSlotsEach * 60);
    CHECK_EQ(stats.jobs[0] + stats.jobs[1], ready.load());
    CHECK_EQ(stats.cancelled, cancelled.load());
    CHECK_EQ(stats.failed, failed.load());
    CHECK_EQ(stats.queued, 0);
    CHECK(failed > 0 && ready > 0);
}

TEST("the newest ticket of a slot is known until it is waited for, however the job ended") {
    Fixture f;
    f.reader->change = [](std::int64_t n, std::int64_t result) { return n == 1 ? -EIO : result; };
    TransferQueue& queue = f.start();
    CHECK(!queue.ticket_of(3));
    const Ticket ready = queue.submit(0, 3, Lane::kDemand);
    CHECK_EQ(queue.ticket_of(3).value().id, ready.id);
    queue.wait(ready);
    CHECK(!queue.ticket_of(3));
    const Ticket failed = queue.submit(1, 3, Lane::kDemand);
    while (!queue.done(failed)) std::this_thread::yield();
    CHECK_EQ(queue.ticket_of(3).value().id, failed.id);  // over, but nobody has asked how
    CHECK_ERROR(ErrorKind::kRead, queue.wait(failed));
    CHECK(!queue.ticket_of(3));
    f.reader->close_gate();
    queue.submit(2, 5, Lane::kDemand);
    const Ticket cancelled = queue.submit(2, 3, Lane::kDemand);
    CHECK(queue.cancel(cancelled));
    const Ticket newer = queue.submit(4, 3, Lane::kDemand);
    CHECK_EQ(queue.ticket_of(3).value().id, newer.id);
    CHECK_ERROR(ErrorKind::kCancelled, queue.wait(cancelled));
    CHECK_EQ(queue.ticket_of(3).value().id, newer.id);
}

EMOE_TEST_MAIN
