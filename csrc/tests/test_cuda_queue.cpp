// The device queue over the fake runtime and a fake reader: file -> pinned memory -> device, lanes, tickets, failures.
#include "cuda/device_queue.hpp"

#include <atomic>
#include <cerrno>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "tests/check.hpp"
#include "tests/cuda_emulation/cudart.hpp"
#include "tests/cuda_emulation/kernel_doubles.hpp"
#include "tests/fake_reader.hpp"

using namespace emoe;
using namespace emoe::cuda;
using emoe::test::FakeReader;
using emoe::test::pattern;

namespace {

constexpr std::int64_t kBytes = 8192;  // of a record; record r is bytes [r, r + 1) * kBytes of one file

struct Fixture {
    explicit Fixture(std::int64_t records = 12, std::int64_t slots = 4, std::int64_t host_slots = 4)
        : backend(std::make_shared<CudaBackend>(
              0, CudaOptions{.piece_bytes = 4096, .demand_in_flight = 8 * kBytes, .prefetch_in_flight = kBytes})),
          slab(std::make_shared<Slab>(backend, slots, kBytes)),
          store(std::make_shared<PinnedCache>(host_slots, kBytes)),
          out(backend->allocate(4096)) {
        check(cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking), "test");
        const std::int64_t file = table->add_file("/proc/self/exe");
        for (std::int64_t r = 0; r < records; ++r) {
            Piece piece{file, r * kBytes, kBytes, "tensor " + std::to_string(r), 0, {}};
            piece.layout = {DType::kUInt8, DType::kUInt8, 1, kBytes, kBytes, 1};
            table->add_record({piece});
        }
    }
    ~Fixture() {
        reader->open_gate();
        queue.reset();
        cudaDeviceSynchronize();
        cudaStreamDestroy(compute);
    }
    DeviceQueue& start(int workers = 2, std::int64_t bound = 1 << 20) {
        queue = std::make_unique<DeviceQueue>(backend, slab, table, reader, store, workers, bound);
        return *queue;
    }
    // A kernel that notes in out[at] whether the slot holds the record.
    void look(std::int64_t slot, std::int64_t record, std::int64_t at, cudaStream_t stream) const {
        const Memory memory = slab->slot(slot);
        const std::array<Range, 1> range = {range_of(memory.data, memory.bytes)};
        std::byte* const result = out.data + at;
        backend->begin_read(range, stream);
        emu::enqueue(stream, [=] {
            bool right = true;
            for (std::int64_t i = 0; i < kBytes; ++i) {
                if (i == kBytes / 2) std::this_thread::sleep_for(std::chrono::microseconds(150));
                right = right && memory.data[i] == pattern(record * kBytes + i);
            }
            *result = right ? std::byte{1} : std::byte{2};
        });
        backend->end_read(range, stream);
    }
    // Whether the slot holds the record now: the emulation lets the host look.
    bool holds(std::int64_t slot, std::int64_t record) const {
        const std::byte* const data = slab->slot(slot).data;
        for (std::int64_t i = 0; i < kBytes; ++i) {
            if (data[i] != pattern(record * kBytes + i)) return false;
        }
        return true;
    }
    bool all_right(std::size_t count) const {
        std::vector<std::byte> seen(count);
        backend->download(seen, out.data, compute);
        return std::all_of(seen.begin(), seen.end(), [](std::byte each) { return each == std::byte{1}; });
    }

    std::shared_ptr<FakeReader> reader = std::make_shared<FakeReader>();
    std::shared_ptr<RecordTable> table = std::make_shared<RecordTable>();
    std::shared_ptr<CudaBackend> backend;
    std::shared_ptr<Slab> slab;
    std::shared_ptr<PinnedCache> store;
    std::unique_ptr<DeviceQueue> queue;
    cudaStream_t compute = nullptr;
    Memory out;
};

}  // namespace

TEST("records reach device slots through fewer pinned slots, ordered for the kernels without the host waiting") {
    Fixture f(12, 3, 2);
    DeviceQueue& queue = f.start();
    std::mt19937 random(7);
    for (std::int64_t step = 0; step < 60; ++step) {
        const auto record = static_cast<std::int64_t>(random() % 12);
        const std::int64_t slot = step % 3;
        queue.order_after(queue.submit(record, slot, Lane::kDemand), f.compute);
        f.look(slot, record, step, f.compute);
    }
    CHECK(f.all_right(60));
    CHECK_EQ(queue.stats().transfer.jobs[0], 60);
}

TEST("order_after alone is enough for a kernel that asks nobody else") {
    Fixture f(12, 12, 2);
    DeviceQueue& queue = f.start();
    for (std::int64_t record = 0; record < 12; ++record) {
        queue.order_after(queue.submit(record, record, Lane::kDemand), f.compute);
        const std::byte* const data = f.slab->slot(record).data;
        std::byte* const result = f.out.data + record;
        emu::enqueue(f.compute, [=] {
            *result = data[kBytes - 1] == pattern(record * kBytes + kBytes - 1) ? std::byte{1} : std::byte{2};
        });
    }
    CHECK(f.all_right(12));
}

TEST("wait returns when the slot holds the record") {
    Fixture f(12, 4, 2);
    DeviceQueue& queue = f.start();
    for (std::int64_t record = 0; record < 12; ++record) {
        const Ticket ticket = queue.submit(record, record % 4, Lane::kDemand);
        CHECK_EQ(queue.wait(ticket), -1);
        CHECK(f.holds(record % 4, record));
        CHECK(queue.done(ticket));
        CHECK_ERROR(ErrorKind::kTransfer, queue.wait(ticket));
    }
}

TEST("a record in pinned memory is not read again, and with a slot for each everything is read once") {
    Fixture f(6, 2, 6);
    DeviceQueue& queue = f.start();
    for (int round = 0; round < 3; ++round) {
        for (std::int64_t record = 0; record < 6; ++record) {
            queue.wait(queue.submit(record, record % 2, Lane::kDemand));
        }
    }
    const DeviceQueueStats stats = queue.stats();
    CHECK_EQ(stats.file_bytes, 6 * kBytes);
    CHECK_EQ(stats.host_misses, 6);
    CHECK_EQ(stats.host_hits, 12);
    CHECK_EQ(stats.transfer.bytes[0], 18 * kBytes);
}

TEST("what pinned memory holds is copied by submit itself, also while every worker is busy") {
    Fixture f(12, 12, 4);
    DeviceQueue& queue = f.start(2);
    queue.wait(queue.submit(5, 5, Lane::kDemand));
    f.reader->close_gate();
    queue.submit(0, 0, Lane::kDemand);
    queue.submit(1, 1, Lane::kDemand);
    f.reader->wait_until_asked(3);
    const Ticket ticket = queue.submit(5, 6, Lane::kDemand);
    CHECK(queue.issued(ticket));
    CHECK_EQ(queue.wait(ticket), -1);
    CHECK(f.slab->slot(6).data[17] == pattern(5 * kBytes + 17));
    CHECK_EQ(queue.stats().host_hits, 1);
    CHECK_EQ(f.store->used(), 2);  // of the two that are read
    emu::fail("cudaMemcpyAsync", 1, cudaErrorIllegalAddress);
    const Ticket failed = queue.submit(5, 7, Lane::kDemand);
    emu::fail(nullptr, 0, cudaSuccess);
    CHECK_ERROR(ErrorKind::kTransfer, queue.order_after(failed, f.compute));
    CHECK_EQ(f.store->used(), 2);
    f.reader->open_gate();
}

TEST("a record that is being read into pinned memory is not copied before it is there") {
    Fixture f(12, 12, 4);
    f.reader->close_gate();
    DeviceQueue& queue = f.start(2);
    const Ticket first = queue.submit(3, 0, Lane::kDemand);
    f.reader->wait_until_asked(1);
    const Ticket second = queue.submit(3, 1, Lane::kDemand);
    CHECK(!queue.issued(second));
    f.reader->open_gate();
    queue.wait(first);
    queue.wait(second);
    for (const std::int64_t slot : {0, 1}) CHECK(f.holds(slot, 3));
}

TEST("a pinned slot is not filled again while the copy that submit made of it is in flight") {
    Fixture f(12, 12, 1);
    DeviceQueue& queue = f.start(2);
    for (std::int64_t round = 0; round < 4; ++round) {
        const std::int64_t record = 2 * round, other = 2 * round + 1;
        queue.wait(queue.submit(record, 0, Lane::kDemand));
        f.backend->finish_copies();
        emu::slow_copies(3000);
        const Ticket copied = queue.submit(record, 1, Lane::kDemand);
        emu::slow_copies(0);
        CHECK(queue.issued(copied));
        queue.wait(queue.submit(other, 2, Lane::kDemand));  // which needs the one pinned slot
        queue.wait(copied);
        CHECK(f.holds(1, record));
    }
}

TEST("a queue may be closed while another thread submits what pinned memory holds") {
    for (int round = 0; round < 6; ++round) {
        Fixture f(12, 12, 12);
        DeviceQueue& queue = f.start(2);
        for (std::int64_t record = 0; record < 12; ++record) queue.wait(queue.submit(record, record, Lane::kDemand));
        std::atomic<bool> closed{false};
        std::atomic<int> submitted{0};
        std::thread other([&] {
            try {
                for (std::int64_t record = 0;; record = (record + 1) % 12) {
                    queue.submit(record, record, Lane::kDemand);
                    ++submitted;
                }
            } catch (const Error& error) {
                closed = error.kind == ErrorKind::kClosed;
            }
        });
        while (submitted < 20 + 7 * round) std::this_thread::yield();
        queue.close();
        other.join();
        CHECK(closed);
        CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});
    }
}

TEST("what pinned memory holds is left to a worker where its lane has no room") {
    Fixture f(12, 12, 12);
    DeviceQueue& queue = f.start(2);
    for (std::int64_t record = 0; record < 12; ++record) queue.wait(queue.submit(record, record, Lane::kDemand));
    emu::copy_engine(500);  // 4 ms a record; the lane has room for eight
    std::vector<Ticket> tickets;
    bool issued = true;
    for (std::int64_t record = 0; record < 12; ++record) {
        tickets.push_back(queue.submit(record, 11 - record, Lane::kDemand));
        issued = issued && queue.issued(tickets.back());
        if (record == 1) CHECK(issued);  // what was copied before takes no room
    }
    CHECK(!issued);  // nor did submit() wait
    for (const Ticket ticket : tickets) queue.wait(ticket);
    emu::copy_engine(0);
    for (std::int64_t record = 0; record < 12; ++record) CHECK(f.holds(11 - record, record));
    CHECK_EQ(queue.stats().host_hits, 12);
    CHECK_EQ(f.store->used(), 0);
}

TEST("demands overtake queued prefetches, and one worker is left for them") {
    Fixture f(12, 12, 12);
    f.reader->close_gate();
    DeviceQueue& queue = f.start(2);
    std::vector<Ticket> prefetches;
    for (std::int64_t record = 0; record < 4; ++record) {
        prefetches.push_back(queue.submit(record, record, Lane::kPrefetch));
    }
    f.reader->wait_until_asked(1);
    const Ticket demand = queue.submit(9, 9, Lane::kDemand);
    f.reader->wait_until_asked(2);
    CHECK_EQ(f.reader->asked()[1], 9 * kBytes);
    CHECK_EQ(queue.stats().transfer.queued, 3);
    CHECK(!queue.issued(demand) && !queue.done(demand));
    f.reader->open_gate();
    queue.wait(demand);
    for (const Ticket ticket : prefetches) queue.wait(ticket);
    CHECK_EQ(queue.stats().transfer.jobs[0], 1);
    CHECK_EQ(queue.stats().transfer.jobs[1], 4);
}

TEST("a promoted prefetch is a demand, a cancelled one never touches its slot") {
    Fixture f(12, 12, 12);
    f.reader->close_gate();
    DeviceQueue& queue = f.start(2);
    const Ticket running = queue.submit(0, 0, Lane::kPrefetch);
    f.reader->wait_until_asked(1);
    const Ticket second = queue.submit(1, 1, Lane::kPrefetch);
    const Ticket third = queue.submit(2, 2, Lane::kPrefetch);
    CHECK(!queue.cancel(running));
    CHECK(queue.cancel(second));
    CHECK_ERROR(ErrorKind::kCancelled, queue.wait(second));
    queue.promote(third);
    f.reader->open_gate();
    queue.wait(third);
    queue.wait(running);
    CHECK_EQ(queue.stats().transfer.jobs[0], 1);
    CHECK_EQ(queue.stats().transfer.cancelled, 1);
    CHECK(f.slab->slot(1).data[0] == std::byte{0});
}

TEST("prefetches are bounded in bytes and demands are not") {
    Fixture f(12, 12, 12);
    f.reader->close_gate();
    DeviceQueue& queue = f.start(2, 2 * kBytes);
    queue.submit(0, 0, Lane::kPrefetch);
    const Ticket queued = queue.submit(1, 1, Lane::kPrefetch);
    const Error full = ERROR_OF(queue.submit(2, 2, Lane::kPrefetch));
    CHECK_EQ(static_cast<int>(full.kind), static_cast<int>(ErrorKind::kQueueFull));
    queue.promote(queued);
    queue.submit(2, 2, Lane::kPrefetch);
    queue.submit(3, 3, Lane::kDemand);
    CHECK_ERROR(ErrorKind::kConfig, queue.submit(99, 0, Lane::kDemand));
    CHECK_ERROR(ErrorKind::kConfig, queue.submit(0, 99, Lane::kDemand));
}

TEST("copies go on while another thread captures a graph") {
    Fixture f;
    DeviceQueue& queue = f.start();
    check(cudaStreamBeginCapture(f.compute, cudaStreamCaptureModeGlobal), "test");
    std::vector<Ticket> tickets;
    for (std::int64_t r = 0; r < 4; ++r) tickets.push_back(queue.submit(r, r, Lane::kDemand));
    for (const Ticket ticket : tickets) {
        while (!queue.issued(ticket)) std::this_thread::yield();
    }
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(f.compute, &graph), "a capture beside copies");
    check(cudaGraphDestroy(graph), "test");
    for (std::int64_t r = 0; r < 4; ++r) f.look(r, r, r, f.compute);
    CHECK(f.all_right(4));
}

TEST("a failed read is thrown once with file and bytes, leaves no pinned slot filled, and the next attempt works") {
    Fixture f(12, 4, 2);
    std::atomic<bool> broken = true;
    f.reader->change = [&](std::int64_t, std::int64_t result) { return broken ? -EIO : result; };
    DeviceQueue& queue = f.start();
    const Error error = ERROR_OF(queue.order_after(queue.submit(3, 0, Lane::kDemand), f.compute));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kRead));
    CHECK_EQ(error.file, std::string("/proc/self/exe"));
    CHECK(!f.store->holds(3));
    CHECK_EQ(f.store->used(), 0);
    broken = false;
    queue.order_after(queue.submit(3, 0, Lane::kDemand), f.compute);
    f.look(0, 3, 0, f.compute);
    CHECK(f.all_right(1));
    CHECK_EQ(queue.stats().transfer.failed, 1);
}

TEST("a copy that the runtime refuses is thrown with its values and gives the pinned slot back") {
    Fixture f(12, 4, 2);
    DeviceQueue& queue = f.start();
    emu::fail("cudaMemcpyAsync", 1, cudaErrorLaunchFailure);
    const Error error = ERROR_OF(queue.wait(queue.submit(5, 1, Lane::kDemand)));
    emu::fail(nullptr, 0, cudaSuccess);
    CHECK_EQ(error.message,
             std::string("cudaErrorLaunchFailure (emulated error) while copying 4096 of 8192 bytes to device 0"));
    CHECK_EQ(f.store->used(), 0);
    queue.wait(queue.submit(5, 1, Lane::kDemand));
}

TEST("a record fetched into pinned memory stays there until it is released") {
    Fixture f(12, 2, 2);
    DeviceQueue& queue = f.start();
    const std::int64_t held = queue.wait(queue.submit_host(7, Lane::kDemand));
    const std::byte* const data = f.store->data() + held * f.store->slot_bytes();
    for (std::int64_t record = 0; record < 6; ++record) queue.wait(queue.submit(record, record % 2, Lane::kDemand));
    for (std::int64_t i = 0; i < kBytes; ++i) CHECK(data[i] == pattern(7 * kBytes + i));
    queue.release_host(held);
    CHECK_EQ(f.store->used(), 0);
}

TEST("close cancels what is queued, waits for copies, and may be called again") {
    Fixture f(12, 12, 2);
    f.reader->close_gate();
    DeviceQueue& queue = f.start(2);
    const Ticket running = queue.submit(0, 0, Lane::kDemand);
    f.reader->wait_until_asked(1);
    std::vector<Ticket> queued;
    for (std::int64_t record = 1; record < 8; ++record) queued.push_back(queue.submit(record, record, Lane::kPrefetch));
    std::thread closer([&] { queue.close(); });
    // Both workers are stuck at the gate with records 0 and 1 at most; the rest is cancelled before it opens.
    std::size_t cancelled = 0;
    const auto count = [&](Ticket ticket) {
        try {
            queue.wait(ticket);
        } catch (const Error& error) {
            CHECK(error.kind == ErrorKind::kCancelled || error.kind == ErrorKind::kClosed);
            ++cancelled;
        }
    };
    for (std::size_t i = 1; i < queued.size(); ++i) count(queued[i]);
    CHECK_EQ(cancelled, std::size_t{6});
    f.reader->open_gate();
    closer.join();
    queue.close();
    queue.wait(running);
    count(queued[0]);
    CHECK_ERROR(ErrorKind::kClosed, queue.submit(0, 0, Lane::kDemand));
    CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});
}

TEST("closing with copies in flight leaves nothing that still reads pinned memory") {
    for (int round = 0; round < 5; ++round) {
        Fixture f(12, 4, 4);
        DeviceQueue& queue = f.start(3);
        for (std::int64_t record = 0; record < 4; ++record) {
            const Ticket ticket = queue.submit(record, record, Lane::kDemand);
            queue.order_after(ticket, f.compute);
        }
        queue.close();
        CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});
        f.store.reset();
    }
}

TEST("many threads share a queue") {
    Fixture f(12, 12, 5);
    DeviceQueue& queue = f.start(3);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (std::int64_t t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            cudaStream_t stream = nullptr;
            check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "test");
            std::mt19937 random(static_cast<unsigned>(t));
            for (std::int64_t step = 0; step < 20; ++step) {
                const auto record = static_cast<std::int64_t>(random() % 12);
                const std::int64_t slot = 4 * t + step % 4;  // slots of its own, as the cache promises
                const Ticket ticket = queue.submit(record, slot, step % 3 ? Lane::kDemand : Lane::kPrefetch);
                queue.promote(ticket);
                queue.order_after(ticket, stream);
                f.look(slot, record, 32 * t + step, stream);
            }
            cudaStreamSynchronize(stream);
            cudaStreamDestroy(stream);
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (std::int64_t t = 0; t < 3; ++t) {
        std::vector<std::byte> seen(20);
        f.backend->download(seen, f.out.data + 32 * t, f.compute);
        for (const std::byte each : seen) wrong += each != std::byte{1};
    }
    CHECK_EQ(wrong.load(), 0);
}

TEST("host slots and tickets that were lost to an exception are taken back, whatever state they are in") {
    Fixture f(12, 2, 4);
    DeviceQueue& queue = f.start();
    queue.wait(queue.submit_host(0, Lane::kDemand));          // held by nobody who could release it
    const Ticket over = queue.submit_host(1, Lane::kDemand);  // over, not waited for
    while (!queue.issued(over)) std::this_thread::yield();
    f.reader->close_gate();
    queue.submit_host(2, Lane::kDemand);  // running
    queue.submit_host(3, Lane::kDemand);
    queue.submit_host(4, Lane::kDemand);  // queued: both workers are busy
    f.reader->wait_until_asked(4);
    CHECK_EQ(f.store->used(), 4);
    f.reader->open_gate();
    queue.reclaim_host();
    CHECK_EQ(f.store->used(), 0);
    CHECK_ERROR(ErrorKind::kTransfer, queue.release_host(0));
    queue.reclaim_host();
    CHECK_EQ(queue.wait(queue.submit(5, 0, Lane::kDemand)), -1);
}

TEST("the ticket of a device slot is known until it is waited for") {
    Fixture f(12, 2, 4);
    DeviceQueue& queue = f.start();
    const Ticket ticket = queue.submit(3, 1, Lane::kPrefetch);
    CHECK_EQ(queue.ticket_of(1).value().id, ticket.id);
    CHECK(!queue.ticket_of(0));
    queue.order_after(ticket, f.compute);
    CHECK(!queue.ticket_of(1));
}

EMOE_TEST_MAIN
