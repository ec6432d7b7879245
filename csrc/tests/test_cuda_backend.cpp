// The CUDA backend over the fake runtime: what waits for what, what is refused, what is given back. Every stream delays
// its work at random; a missing wait shows as a wrong byte, as a race under ThreadSanitizer or as a use after free.
#include "cuda/cuda_backend.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "core/slab.hpp"
#include "cuda/pinned_cache.hpp"
#include "tests/check.hpp"
#include "tests/compute_stream.hpp"
#include "tests/cuda_emulation/cudart.hpp"
#include "tests/cuda_emulation/kernel_doubles.hpp"

using namespace emoe;
using namespace emoe::cuda;
using emoe::test::ComputeStream;

namespace {

constexpr std::int64_t kSlotBytes = 4096;

// Source e is filled with byte e + 1.
struct Sources {
    explicit Sources(std::size_t count) : memory(count * kSlotBytes, 0) {
        for (std::size_t e = 0; e < count; ++e) std::fill_n(memory.data() + e * kSlotBytes, kSlotBytes, value(e));
    }
    static std::byte value(std::size_t e) { return static_cast<std::byte>(e + 1); }
    std::span<const std::byte> of(std::size_t e) const { return {memory.data() + e * kSlotBytes, kSlotBytes}; }
    PinnedBuffer memory;
};

struct Fixture {
    explicit Fixture(std::int64_t slots = 3, CudaOptions options = {})
        : backend(std::make_shared<CudaBackend>(0, options)),
          slab(std::make_unique<Slab>(backend, slots, kSlotBytes)),
          out(backend->allocate(4096 * sizeof(float))),
          inputs(backend->allocate(4096)) {}
    ~Fixture() { cudaDeviceSynchronize(); }

    // The double writes out[at + e] for every expert e with a slot.
    GatherMlp op(const std::vector<std::int32_t>& slot_of, std::size_t at, std::int64_t tokens = 1) const {
        GatherMlp call;
        call.layout.hidden = call.layout.hidden_out = call.layout.intermediate = 4;
        call.layout.down_offset = 1024;
        call.slab = slab->memory().data;
        call.slot_bytes = slab->slot_bytes();
        call.slot_of = slot_of;
        call.hidden = call.weights = inputs.data;
        call.index = reinterpret_cast<const std::int64_t*>(inputs.data);
        call.tokens = tokens;
        call.top_k = 1;
        call.out = reinterpret_cast<float*>(out.data) + at;
        return call;
    }
    std::vector<float> results(std::size_t count, cudaStream_t stream) const {
        std::vector<float> host(count);
        backend->download(std::as_writable_bytes(std::span(host)), out.data, stream);
        return host;
    }

    std::shared_ptr<CudaBackend> backend;
    std::unique_ptr<Slab> slab;
    Memory out, inputs;
};

}  // namespace

TEST("a kernel sees the whole expert that was copied into its slot, and a slot is reused only after its last reader") {
    Fixture f(3);
    const Sources sources(16);
    const ComputeStream compute;
    std::mt19937 random(1);
    std::vector<float> expected;
    for (std::size_t step = 0; step < 60; ++step) {
        const std::size_t expert = random() % 16;
        const std::int32_t slot = static_cast<std::int32_t>(step % 3);
        f.backend->copy(f.slab->slot(slot), sources.of(expert), step % 2 ? Lane::kDemand : Lane::kPrefetch);
        f.backend->gather_mlp(f.op({slot}, step), compute);
        expected.push_back(static_cast<float>(expert + 1));
    }
    CHECK(f.results(60, compute) == expected);
}

TEST("copies of both lanes into one slot land in the order they were asked for") {
    Fixture f(1);
    const Sources sources(16);
    const ComputeStream compute;
    for (std::size_t step = 0; step < 30; ++step) {
        f.backend->copy(f.slab->slot(0), sources.of(step % 16), Lane::kPrefetch);
        f.backend->copy(f.slab->slot(0), sources.of((step + 5) % 16), Lane::kDemand);
        f.backend->gather_mlp(f.op({0}, step), compute);
    }
    const std::vector<float> seen = f.results(30, compute);
    for (std::size_t step = 0; step < 30; ++step) CHECK_EQ(seen[step], static_cast<float>((step + 5) % 16 + 1));
}

TEST("a slot that two compute streams read is overwritten after both") {
    Fixture f(1);
    const Sources sources(16);
    const std::array<ComputeStream, 2> streams;
    for (std::size_t step = 0; step < 30; ++step) {
        f.backend->copy(f.slab->slot(0), sources.of(step % 16), Lane::kDemand);
        f.backend->gather_mlp(f.op({0}, 2 * step), streams[0]);
        f.backend->gather_mlp(f.op({0}, 2 * step + 1), streams[1]);
    }
    cudaDeviceSynchronize();
    const std::vector<float> seen = f.results(60, streams[0]);
    for (std::size_t i = 0; i < 60; ++i) CHECK_EQ(seen[i], static_cast<float>(i / 2 % 16 + 1));
}

TEST("work on a stream of the caller's own between begin_read and end_read is ordered like a kernel") {
    Fixture f(2);
    const Sources sources(16);
    const ComputeStream compute;
    auto* const out = reinterpret_cast<float*>(f.out.data);
    for (std::size_t step = 0; step < 30; ++step) {
        const Memory slot = f.slab->slot(static_cast<std::int64_t>(step % 2));
        f.backend->copy(slot, sources.of(step % 16), Lane::kDemand);
        const std::array<Range, 1> range = {range_of(slot.data, slot.bytes)};
        f.backend->begin_read(range, compute);
        emu::enqueue(compute, [=] { out[step] = static_cast<float>(uniform_byte(slot.data, slot.bytes)); });
        f.backend->end_read(range, compute);
    }
    const std::vector<float> seen = f.results(30, compute);
    for (std::size_t step = 0; step < 30; ++step) CHECK_EQ(seen[step], static_cast<float>(step % 16 + 1));
}

TEST("a pageable source may change as soon as copy_async has returned, and order_after holds back a stream") {
    Fixture f(1, {.staging_chunks = 2, .staging_chunk_bytes = 1024});
    const Memory target = f.backend->allocate(40 * 4096);
    const ComputeStream compute;
    auto* const out = reinterpret_cast<float*>(f.out.data);
    std::vector<std::byte> source(4096);
    for (std::size_t step = 0; step < 40; ++step) {
        std::fill(source.begin(), source.end(), static_cast<std::byte>(step + 1));
        const Memory part{target.data + step * 4096, 4096, false};
        const Ticket ticket = f.backend->copy_async(part, source);
        f.backend->order_after(ticket, compute);
        emu::enqueue(compute, [=] { out[step] = static_cast<float>(uniform_byte(part.data, part.bytes)); });
    }
    const std::vector<float> seen = f.results(40, compute);
    for (std::size_t step = 0; step < 40; ++step) CHECK_EQ(seen[step], static_cast<float>(step + 1));
    f.backend->free(target);
}

TEST("the virtual interface computes on the stream it is given, after the copies into its slots") {
    Fixture f(2);
    const ComputeStream compute;
    Backend& backend = *f.backend;
    std::vector<std::byte> source(kSlotBytes);
    for (std::size_t step = 0; step < 20; ++step) {
        const auto slot = static_cast<std::int32_t>(step % 2);
        std::fill(source.begin(), source.end(), static_cast<std::byte>(step + 1));
        f.backend->copy_async(f.slab->slot(slot), source);
        const std::vector<std::int32_t> table = {slot};
        CHECK(backend.supports(f.op(table, step)));
        backend.gather_mlp(f.op(table, step), compute);
    }
    const std::vector<float> seen = f.results(20, compute);
    for (std::size_t step = 0; step < 20; ++step) CHECK_EQ(seen[step], static_cast<float>(step + 1));
}

TEST("wait returns when the bytes are there, and done says so without blocking") {
    Fixture f(1);
    const Memory target = f.backend->allocate(4096);
    std::vector<std::byte> source(4096);
    for (int round = 1; round <= 20; ++round) {
        std::fill(source.begin(), source.end(), static_cast<std::byte>(round));
        const Ticket ticket = f.backend->copy_async(target, source);
        f.backend->wait(ticket);
        CHECK(f.backend->done(ticket));
        // On the emulation the host may look; on a GPU a download would be needed.
        CHECK_EQ(uniform_byte(target.data, target.bytes), round);
    }
    CHECK_ERROR(ErrorKind::kTransfer, f.backend->done({0}));
    CHECK_ERROR(ErrorKind::kTransfer, f.backend->wait({1000}));
    f.backend->free(target);
}

TEST("slot tables and scratch of many calls in a row do not run into each other") {
    Fixture f(8, {.staging_chunks = 2, .staging_chunk_bytes = 4096});
    const Sources sources(8);
    const ComputeStream compute;
    for (std::size_t slot = 0; slot < 8; ++slot) {
        f.backend->copy(f.slab->slot(static_cast<std::int64_t>(slot)), sources.of(slot), Lane::kDemand);
    }
    for (std::size_t step = 0; step < 40; ++step) {
        std::vector<std::int32_t> table(8, -1);  // expert e in slot (e + step) % 8, one expert a call
        table[step % 8] = static_cast<std::int32_t>((step + step / 8) % 8);
        f.backend->gather_mlp(f.op(table, step * 8, static_cast<std::int64_t>(1 + step / 10)), compute);
    }
    const std::vector<float> seen = f.results(320, compute);
    for (std::size_t step = 0; step < 40; ++step) {
        CHECK_EQ(seen[step * 8 + step % 8], static_cast<float>((step + step / 8) % 8 + 1));
    }
}

TEST("no lane has more bytes in flight than its bound") {
    Fixture f(16, {.piece_bytes = 1024, .demand_in_flight = 2 * 1024 + 1023, .prefetch_in_flight = 1});
    const Sources sources(16);
    f.backend->finish_copies();
    emu::reset_counters();
    for (std::size_t i = 0; i < 32; ++i) {
        f.backend->copy(f.slab->slot(static_cast<std::int64_t>(i % 16)), sources.of(i % 16), Lane::kDemand);
    }
    CHECK(emu::counters().most_in_flight <= 2);
    f.backend->finish_copies();
    emu::reset_counters();
    for (std::size_t i = 0; i < 16; ++i) {
        f.backend->copy(f.slab->slot(static_cast<std::int64_t>(i)), sources.of(i), Lane::kPrefetch);
    }
    CHECK(emu::counters().most_in_flight <= 1);
    f.backend->finish_copies();
    CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});
}

TEST("a copy of any size arrives whole, in pieces") {
    Fixture f(1, {.piece_bytes = 1000, .demand_in_flight = 2000, .prefetch_in_flight = 1000});
    for (const Lane lane : {Lane::kDemand, Lane::kPrefetch}) {
        for (const std::size_t bytes : {1, 999, 1000, 1001, 2000, 4095, 4096}) {
            const PinnedBuffer source(4096, 0);
            std::vector<std::byte> expected(bytes), back(bytes);
            for (std::size_t i = 0; i < bytes; ++i) expected[i] = static_cast<std::byte>(i * 7 + bytes);
            std::copy(expected.begin(), expected.end(), source.data());
            emu::reset_counters();
            f.backend->copy(f.slab->slot(0), {source.data(), bytes}, lane).synchronize();
            CHECK_EQ(emu::counters().copies, std::uint64_t{(bytes + 999) / 1000});
            f.backend->download(back, f.slab->slot(0).data, nullptr);
            CHECK(back == expected);
        }
    }
}

TEST("of a prefetch two pieces are in flight, and a demand is done long before the rest") {
    constexpr std::size_t kPieces = 40, kPiece = 1024;
    Fixture f(1, {.piece_bytes = kPiece, .demand_in_flight = 8 * kPiece, .prefetch_in_flight = 2 * kPiece});
    const PinnedBuffer large(kPieces * kPiece, 0);
    std::fill_n(large.data(), kPieces * kPiece, std::byte{9});
    const Sources sources(1);
    const Memory target = f.backend->allocate(kPieces * kPiece);
    const auto until = [](const auto& holds) {
        for (int i = 0; i < 100000 && !holds(); ++i) std::this_thread::sleep_for(std::chrono::microseconds(100));
    };
    emu::copy_engine(2000);
    emu::hold_engines(true);
    emu::keep_timeline(true);
    emu::reset_counters();
    std::thread prefetch([&] { f.backend->copy(target, {large.data(), kPieces * kPiece}, Lane::kPrefetch); });
    until([] { return emu::counters().copies >= 2; });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // time enough for a third
    CHECK_EQ(emu::counters().copies, std::uint64_t{2});
    const Event demanded = f.backend->copy(f.slab->slot(0), sources.of(0), Lane::kDemand);
    CHECK_EQ(emu::counters().copies, std::uint64_t{2 + kSlotBytes / kPiece});
    until([] { return emu::waiting_for_engine(0) >= 2; });
    emu::hold_engines(false);
    demanded.synchronize();
    CHECK(emu::counters().copies < 2 + kSlotBytes / kPiece + kPieces / 2);
    prefetch.join();
    f.backend->finish_copies();
    const std::vector<emu::Span> ran = emu::timeline();
    emu::keep_timeline(false);
    emu::copy_engine(0);
    CHECK_EQ(ran.size(), kPieces + kSlotBytes / kPiece);
    CHECK(ran[0].target == target.data);
    CHECK(ran[1].target == f.slab->slot(0).data);  // between two pieces of the prefetch
    std::vector<std::byte> back(kPieces * kPiece);
    f.backend->download(back, target.data, nullptr);
    CHECK(std::ranges::all_of(back, [](std::byte each) { return each == std::byte{9}; }));
    f.backend->free(target);
}

TEST("a call of the kernels makes no copy, however many experts a layer has") {
    Fixture f(4);
    const Sources sources(4);
    const ComputeStream compute;
    for (std::int32_t s = 0; s < 4; ++s) f.backend->copy(f.slab->slot(s), sources.of(s), Lane::kDemand);
    f.backend->finish_copies();
    emu::reset_counters();
    const std::vector<std::int32_t> small = {-1, 2}, large = [] {
        std::vector<std::int32_t> table(3000, -1);
        table[0] = 0, table[959] = 1, table[960] = 2, table[2999] = 3;
        return table;
    }();
    f.backend->gather_mlp(f.op(small, 0), compute);
    f.backend->gather_mlp(f.op(large, 2), compute);
    const Memory table = f.backend->allocate(3000 * sizeof(std::int32_t));
    f.backend->write_table(table, large, compute);
    CHECK_EQ(emu::counters().copies, std::uint64_t{0});
    const std::vector<float> seen = f.results(3002, compute);
    CHECK_EQ(seen[1], 3.0F);
    CHECK_EQ(seen[2], 1.0F);
    CHECK_EQ(seen[2 + 959], 2.0F);
    CHECK_EQ(seen[2 + 960], 3.0F);
    CHECK_EQ(seen[2 + 2999], 4.0F);
    CHECK_ERROR(ErrorKind::kConfig, f.backend->write_table(f.inputs, large, compute));
    std::vector<std::byte> written(table.bytes);
    f.backend->download(written, table.data, compute);
    CHECK(std::ranges::equal(written, std::as_bytes(std::span(large))));
    f.backend->free(table);
}

namespace {

// How much of the shorter of copies and kernels runs beside the other: eight layers, whose experts take `ms` * 8 to
// copy and `ms` * 24 to compute with, while those of the next are prefetched.
double overlap(unsigned ms) {
    constexpr std::size_t kLayers = 8, kExperts = 2;
    Fixture f(2 * kExperts, {.piece_bytes = 1024, .demand_in_flight = 8192, .prefetch_in_flight = 2048});
    const Sources sources(kLayers * kExperts);
    const ComputeStream compute;
    for (std::int32_t s = 0; s < 2; ++s) {
        f.backend->copy(f.slab->slot(s), sources.of(static_cast<std::size_t>(s)), Lane::kDemand);
    }
    f.backend->finish_copies();
    emu::copy_engine(1000 * ms);
    emu::keep_timeline(true);
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
        const auto first = static_cast<std::int32_t>(layer % 2 * kExperts);
        f.backend->gather_mlp(f.op({first, first + 1}, layer * kExperts), compute);
        emu::enqueue(compute, [=] { std::this_thread::sleep_for(std::chrono::milliseconds(24 * ms)); });
        const std::array<Range, 1> range = {
            range_of(f.slab->slot(first).data, kExperts * static_cast<std::size_t>(kSlotBytes))};
        f.backend->end_read(range, compute);
        if (layer + 1 == kLayers) break;
        const auto next = static_cast<std::int32_t>((layer + 1) % 2 * kExperts);
        for (std::size_t e = 0; e < kExperts; ++e) {
            f.backend->copy(f.slab->slot(next + static_cast<std::int64_t>(e)), sources.of((layer + 1) * kExperts + e),
                            Lane::kPrefetch);
        }
    }
    const std::vector<float> seen = f.results(kLayers * kExperts, compute);
    const std::vector<emu::Span> ran = emu::timeline();
    emu::keep_timeline(false);
    emu::copy_engine(0);
    for (std::size_t at = 0; at < seen.size(); ++at) CHECK_EQ(seen[at], static_cast<float>(at + 1));
    double copies = 0, kernels = 0, both = 0;
    for (const emu::Span& copy : ran) {
        if (!copy.copy) kernels += copy.end - copy.begin;
        if (!copy.copy || copy.bytes != 1024) continue;
        copies += copy.end - copy.begin;
        for (const emu::Span& kernel : ran) {
            if (kernel.copy) continue;
            both += std::max(0.0, std::min(copy.end, kernel.end) - std::max(copy.begin, kernel.begin));
        }
    }
    return both / std::min(copies, kernels);
}

}  // namespace

TEST("the next layer's experts are copied while this one computes") {
    // A busy machine holds up threads for some milliseconds: then the same is tried with longer ones.
    double most = 0;
    for (unsigned ms = 1; ms <= 12 && most < 0.8; ++ms) most = std::max(most, overlap(ms));
    CHECK(most >= 0.8);
}

TEST("upload and download carry any size through small chunks") {
    Fixture f(1, {.staging_chunks = 2, .staging_chunk_bytes = 512});
    const ComputeStream compute;
    const Memory target = f.backend->allocate(10000);
    for (const std::size_t bytes : {std::size_t{1}, std::size_t{511}, std::size_t{513}, std::size_t{10000}}) {
        std::vector<std::byte> source(bytes), back(bytes);
        for (std::size_t i = 0; i < bytes; ++i) source[i] = static_cast<std::byte>(i * 31 + bytes);
        f.backend->upload(target, source, compute);
        const std::vector<std::byte> expected = source;
        std::fill(source.begin(), source.end(), std::byte{0});
        f.backend->download(back, target.data, compute);
        CHECK(back == expected);
    }
    CHECK_ERROR(ErrorKind::kConfig, f.backend->upload(target, std::vector<std::byte>(10001), compute));
    f.backend->free(target);
}

TEST("allocated memory is cleared") {
    Fixture f(1);
    const Memory memory = f.backend->allocate(100000);
    CHECK(!memory.host);
    std::vector<std::byte> back(100000);
    f.backend->download(back, memory.data, nullptr);
    CHECK(std::all_of(back.begin(), back.end(), [](std::byte b) { return b == std::byte{0}; }));
    f.backend->free(memory);
}

TEST("memory is given back only when nothing uses it any more") {
    Fixture f(1);
    const Sources sources(16);
    const ComputeStream compute;
    for (std::size_t round = 0; round < 10; ++round) {
        auto slab = std::make_unique<Slab>(f.backend, 4, kSlotBytes);
        f.backend->copy(slab->slot(0), sources.of(round), Lane::kDemand);
        const std::array<Range, 1> range = {range_of(slab->slot(0).data, kSlotBytes)};
        f.backend->begin_read(range, compute);
        auto* const out = reinterpret_cast<float*>(f.out.data) + round;
        const std::byte* const data = slab->slot(0).data;
        emu::enqueue(compute, [=] { *out = static_cast<float>(uniform_byte(data, kSlotBytes)); });
        f.backend->end_read(range, compute);
    }
    const std::vector<float> seen = f.results(10, compute);
    for (std::size_t round = 0; round < 10; ++round) CHECK_EQ(seen[round], static_cast<float>(round + 1));
}

TEST("everything is given back, also with copies and kernels in flight") {
    const emu::Counters before = emu::counters();
    for (int round = 0; round < 5; ++round) {
        const Sources sources(4);
        const ComputeStream compute;
        {
            Fixture f(4);
            for (std::int32_t s = 0; s < 4; ++s) {
                f.backend->copy(f.slab->slot(s), sources.of(static_cast<std::size_t>(s)), Lane::kPrefetch);
                f.backend->gather_mlp(f.op({s}, static_cast<std::size_t>(s)), compute);
            }
        }
    }
    const emu::Counters after = emu::counters();
    CHECK_EQ(after.device_bytes, before.device_bytes);
    CHECK_EQ(after.pinned_bytes, before.pinned_bytes);
    CHECK_EQ(after.events_alive, before.events_alive);
    CHECK_EQ(after.streams_alive, before.streams_alive);
}

TEST("an event goes on naming its own point while others are recorded") {
    const std::shared_ptr<EventPool> pool = EventPool::make(0);
    const ComputeStream slow, idle;
    for (int round = 0; round < 3; ++round) {
        const auto over = std::make_shared<std::atomic<bool>>(false);
        emu::enqueue(slow, [over] {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            over->store(true);
        });
        const Event first = pool->record(slow);
        pool->record(idle).synchronize();
        first.synchronize();
        CHECK(over->load());
    }
}

TEST("an idle hazard list is forgotten") {
    Fixture f(4);
    const ComputeStream compute;
    const Sources sources(4);
    Hazards hazards;
    const std::shared_ptr<EventPool> pool = EventPool::make(0);
    for (std::uintptr_t i = 0; i < 10; ++i) {
        hazards.read({i * 100, i * 100 + 100}, compute, pool->record(compute));
        hazards.wrote({i * 100 + 50, i * 100 + 60}, compute, pool->record(compute));
    }
    CHECK(hazards.pending() > 0);
    cudaStreamSynchronize(compute);
    hazards.prune();
    CHECK_EQ(hazards.pending(), std::size_t{0});
}

TEST("a host slot is not filled again while a copy out of it is in flight") {
    Fixture f(2);
    PinnedCache store(1, kSlotBytes);
    const ComputeStream compute;
    for (std::int64_t step = 0; step < 40; ++step) {
        const PinnedCache::Lease lease = store.acquire(step);
        CHECK(lease.fill);
        std::fill_n(lease.data, kSlotBytes, static_cast<std::byte>(step + 1));
        store.filled(lease.slot);
        const auto slot = static_cast<std::int32_t>(step % 2);
        store.release(lease.slot, f.backend->copy(f.slab->slot(slot), {lease.data, kSlotBytes}, Lane::kDemand));
        f.backend->gather_mlp(f.op({slot}, static_cast<std::size_t>(step)), compute);
    }
    const std::vector<float> seen = f.results(40, compute);
    for (std::size_t step = 0; step < 40; ++step) CHECK_EQ(seen[step], static_cast<float>(step + 1));
}

TEST("the pinned cache keeps what was used last and never gives away a slot in use") {
    PinnedCache store(3, 100);
    CHECK_EQ(store.slot_bytes(), kPageBytes);
    for (const std::int64_t record : {10, 11, 12}) {
        const PinnedCache::Lease lease = store.acquire(record);
        CHECK(lease.fill);
        store.filled(lease.slot);
        store.release(lease.slot);
    }
    const PinnedCache::Lease held = store.acquire(10);  // the oldest, now the youngest and in use
    CHECK(!held.fill);
    for (const std::int64_t record : {13, 14, 15}) {
        const PinnedCache::Lease lease = store.acquire(record);
        CHECK(lease.fill && lease.slot != held.slot);
        store.filled(lease.slot);
        store.release(lease.slot);
    }
    CHECK(store.holds(10) && store.holds(14) && store.holds(15));
    CHECK(!store.holds(11) && !store.holds(12) && !store.holds(13));
    CHECK_EQ(store.used(), 1);
    store.release(held.slot);
    const PinnedCache::Lease broken = store.acquire(16);
    store.failed(broken.slot);
    CHECK(!store.holds(16));
    CHECK_EQ(store.used(), 0);
    store.close();
    CHECK_ERROR(ErrorKind::kClosed, store.acquire(10));
    CHECK_ERROR(ErrorKind::kConfig, PinnedCache(0, 100));
}

TEST("errors name the call, the sizes and the device") {
    Fixture f(2);
    const Sources sources(2);
    emu::fail("cudaMemcpyAsync", 1, cudaErrorIllegalAddress);
    const Error copy = ERROR_OF(f.backend->copy(f.slab->slot(0), sources.of(0), Lane::kDemand));
    CHECK_EQ(static_cast<int>(copy.kind), static_cast<int>(ErrorKind::kTransfer));
    CHECK_EQ(copy.message,
             std::string("cudaErrorIllegalAddress (emulated error) while copying 4096 of 4096 bytes to device 0"));
    emu::fail(nullptr, 0, cudaSuccess);
    emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);
    CHECK_ERROR(ErrorKind::kTransfer, f.backend->copy(f.slab->slot(0), sources.of(0), Lane::kDemand));
    CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});  // nobody could wait for a copy without an event
    emu::fail(nullptr, 0, cudaSuccess);
    const Error memory = ERROR_OF(f.backend->allocate(std::size_t{1} << 40));
    CHECK_EQ(static_cast<int>(memory.kind), static_cast<int>(ErrorKind::kBudget));
    CHECK(memory.message.find("allocating 1099511627776 bytes on device 0, which has ") != std::string::npos);
    CHECK_ERROR(ErrorKind::kBudget, PinnedBuffer(std::size_t{1} << 40, 0));
    CHECK_ERROR(ErrorKind::kConfig, f.backend->copy({f.slab->slot(0).data, 10, false}, sources.of(0), Lane::kDemand));
    CHECK_ERROR(ErrorKind::kConfig, CudaBackend(0, {.piece_bytes = 0}));
    const std::vector<std::int32_t> table = {0};
    GatherMlp accumulate = f.op(table, 0);
    accumulate.mode = OutMode::kAccumulate;
    CHECK_ERROR(ErrorKind::kConfig, f.backend->gather_mlp(accumulate, nullptr));
    CHECK(!f.backend->supports(accumulate));
    f.backend->copy(f.slab->slot(0), sources.of(0), Lane::kDemand);  // the device still works
    f.backend->finish_copies();
}

TEST("a call that fails half-way leaves nothing behind that reads a slot or a staging chunk") {
    Fixture f(1, {.staging_chunks = 2, .staging_chunk_bytes = 4096});
    const Sources sources(16);
    const ComputeStream compute;
    std::vector<std::byte> back(4096);
    for (std::size_t step = 0; step < 12; ++step) {
        f.backend->copy(f.slab->slot(0), sources.of(step), Lane::kDemand);
        f.backend->gather_mlp(f.op({0}, 2 * step), compute);
        emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);
        CHECK_ERROR(ErrorKind::kTransfer, f.backend->gather_mlp(f.op({0}, 2 * step + 1), compute));
        emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);
        CHECK_ERROR(ErrorKind::kTransfer, f.backend->upload(f.inputs, std::vector<std::byte>(4096), compute));
        emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);
        CHECK_ERROR(ErrorKind::kTransfer, f.backend->download(back, f.inputs.data, compute));
        emu::fail(nullptr, 0, cudaSuccess);
    }
    const std::vector<float> seen = f.results(24, compute);
    for (std::size_t step = 0; step < 12; ++step) {
        CHECK_EQ(seen[2 * step], static_cast<float>(step + 1));
        CHECK_EQ(seen[2 * step + 1], static_cast<float>(step + 1));  // its kernels had the whole slot
    }
}

TEST("a copy that fails at a later piece is over before its source may change") {
    Fixture f(1, {.piece_bytes = 1024, .demand_in_flight = 8192, .prefetch_in_flight = 8192});
    for (const Lane lane : {Lane::kDemand, Lane::kPrefetch}) {
        for (const char* call : {"cudaMemcpyAsync", "cudaEventRecord"}) {
            const Sources sources(1);
            emu::slow_copies(2000);
            emu::fail(call, 3, cudaErrorLaunchFailure);
            CHECK_ERROR(ErrorKind::kTransfer, f.backend->copy(f.slab->slot(0), sources.of(0), lane));
            emu::fail(nullptr, 0, cudaSuccess);
            emu::slow_copies(0);
            CHECK_EQ(emu::counters().copies_in_flight, std::uint64_t{0});
        }
    }
    const Sources sources(2);
    f.backend->copy(f.slab->slot(0), sources.of(1), Lane::kDemand).synchronize();
    CHECK_EQ(static_cast<int>(*f.slab->slot(0).data), 2);
}

TEST("without a driver or a device the error says which is missing, and an index out of range names the choices") {
    emu::pretend_device_error(cudaErrorInsufficientDriver);
    const Error driver = ERROR_OF(CudaBackend(0));
    CHECK_EQ(static_cast<int>(driver.kind), static_cast<int>(ErrorKind::kBackendUnavailable));
    CHECK_EQ(driver.message, std::string("no CUDA driver is installed on this machine"));
    CHECK(look_around().devices.empty());
    emu::pretend_device_error(cudaErrorNoDevice);
    const Error device = ERROR_OF(CudaBackend(0));
    CHECK_EQ(static_cast<int>(device.kind), static_cast<int>(ErrorKind::kBackendUnavailable));
    CHECK(device.message.find("no CUDA device") != std::string::npos);
    emu::pretend_device_error(cudaSuccess);
    CHECK_EQ(look_around().problem, std::string());
    const Error index = ERROR_OF(CudaBackend(7));
    CHECK_EQ(static_cast<int>(index.kind), static_cast<int>(ErrorKind::kConfig));
    CHECK(index.message.find("device 7 is none of the ") != std::string::npos);
}

TEST("two devices have streams, events and memory of their own, whichever is current") {
    if (look_around().devices.size() < 2) return;  // EMU_DEVICES=2
    Fixture first(1);
    const std::uint64_t on_first = emu::bytes_of_device(0);
    const auto second = std::make_shared<CudaBackend>(1);
    const Slab slab(second, 1, kSlotBytes);
    const PinnedCache store(1, kSlotBytes, 1);
    CHECK_EQ(emu::bytes_of_device(0), on_first);  // nor pinned memory of another device's context
    CHECK(emu::bytes_of_device(1) > 0);
    const Sources sources(16);
    std::optional<ComputeStream> compute;
    {
        const DeviceScope scope(1);
        compute.emplace();
    }
    std::vector<std::byte> back(kSlotBytes);
    for (std::size_t e = 0; e < 16; ++e) {
        second->copy(slab.slot(0), sources.of(e), Lane::kDemand);
        first.backend->copy(first.slab->slot(0), sources.of(15 - e), Lane::kDemand);
        const std::array<Range, 1> range = {range_of(slab.slot(0).data, kSlotBytes)};
        second->begin_read(range, *compute);
        second->download(back, slab.slot(0).data, *compute);
        second->end_read(range, *compute);
        CHECK_EQ(uniform_byte(back.data(), back.size()), static_cast<int>(e + 1));
    }
    first.backend->finish_copies();
    second->finish_copies();
    int current = -1;
    cudaGetDevice(&current);
    CHECK_EQ(current, 0);
    compute.reset();
}

int main(int argc, char** argv) {
    setenv("EMU_DEVICES", "2", 0);
    return emoe::test::run_all(argc > 1 ? argv[1] : "");
}
