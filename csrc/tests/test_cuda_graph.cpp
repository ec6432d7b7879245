// Calls with the slot table on the device, plain and captured in a graph, with the real kernels on the fake runtime:
// same bits, order between replays and copies, what a capture refuses. The last tests hold the fake runtime's captures
// to what NVIDIA documents.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/slab.hpp"
#include "cuda/cuda_backend.hpp"
#include "tests/check.hpp"
#include "tests/compute_stream.hpp"
#include "tests/cuda_emulation/cudart.hpp"
#include "tests/kernel_cases.hpp"

using namespace emoe;
using namespace emoe::cuda;
using emoe::test::BF16;
using emoe::test::ComputeStream;
using emoe::test::F32;
using emoe::test::MlpCase;
using emoe::test::Problem;

namespace {

using Table = std::vector<std::int32_t>;

void begin(cudaStream_t stream, cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
    check(cudaStreamBeginCapture(stream, mode), "beginning a capture");
}
cudaError_t end(cudaStream_t stream) {
    cudaGraph_t graph = nullptr;
    const cudaError_t code = cudaStreamEndCapture(stream, &graph);
    cudaGetLastError();  // or the next launch reports it
    CHECK_EQ(graph != nullptr, code == cudaSuccess);
    if (graph != nullptr) check(cudaGraphDestroy(graph), "test");
    return code;
}

// What `work` gives to the stream.
struct CapturedGraph {
    CapturedGraph(cudaStream_t stream, const std::function<void()>& work) {
        begin(stream);
        work();
        cudaGraph_t graph = nullptr;
        check(cudaStreamEndCapture(stream, &graph), "ending a capture");
        check(cudaGraphInstantiate(&exec, graph, 0), "test");
        check(cudaGraphDestroy(graph), "test");
    }
    ~CapturedGraph() { cudaGraphExecDestroy(exec); }
    CapturedGraph(const CapturedGraph&) = delete;
    CapturedGraph& operator=(const CapturedGraph&) = delete;
    void replay(cudaStream_t stream) const { check(cudaGraphLaunch(exec, stream), "test"); }
    cudaGraphExec_t exec = nullptr;
};

MlpCase case_of(std::int64_t tokens) { return {"layer", BF16, BF16, F32, tokens, 3, 5, 40, 24, 40, Activation::kSilu}; }
constexpr std::array<std::int64_t, 2> kTokensOfPaths = {3, 12};  // rows, tiles

// A layer of 5 experts, slots for some of them, and its call with the table in device memory.
struct Layer {
    Layer(std::int64_t tokens, std::int64_t slots)
        : p(case_of(tokens)),
          backend(std::make_shared<CudaBackend>(0)),
          slab(backend, slots, p.slot_bytes),
          records(p.slab.size(), 0) {
        std::memcpy(records.data(), p.slab.data(), p.slab.size());
        op.layout = p.layout;
        op.slab = slab.memory().data;
        op.slot_bytes = slab.slot_bytes();
        op.experts = p.c.E;
        table = backend->allocate(static_cast<std::size_t>(p.c.E) * sizeof(std::int32_t));
        op.slot_of = reinterpret_cast<const std::int32_t*>(table.data);
        op.hidden = on_device(std::as_bytes(std::span(p.hidden)));
        op.hidden_dtype = p.c.hidden;
        op.tokens = tokens;
        op.index = reinterpret_cast<const std::int64_t*>(on_device(std::as_bytes(std::span(p.index))));
        op.weights = on_device(std::as_bytes(std::span(p.weights)));
        op.weights_dtype = p.c.routing;
        op.top_k = p.c.K;
        elements = static_cast<std::size_t>(tokens * p.c.K * p.c.Ho);
        pairs = backend->allocate(elements * sizeof(float));
        op.out = reinterpret_cast<float*>(pairs.data);
        result = backend->allocate(elements / static_cast<std::size_t>(p.c.K) * sizeof(float));
        workspace = backend->allocate(workspace_bytes(op));
        log = backend->allocate(kSteps * pairs.bytes);
    }
    ~Layer() {
        cudaDeviceSynchronize();
        for (const Memory memory : {table, pairs, result, workspace, log}) backend->free(memory);
    }
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;

    const std::byte* on_device(std::span<const std::byte> values) const {
        const Memory memory = backend->allocate(values.size());
        backend->upload(memory, values, nullptr);
        check(cudaStreamSynchronize(nullptr), "test");
        return memory.data;
    }
    void load(std::size_t expert, std::int64_t slot, Lane lane = Lane::kDemand) const {
        const auto bytes = static_cast<std::size_t>(p.slot_bytes);
        const std::size_t at = static_cast<std::size_t>(p.slot_of[expert]) * bytes;
        backend->copy(slab.slot(slot), {records.data() + at, bytes}, lane);
    }
    void set_table(const Table& slot_of, cudaStream_t stream) const {
        backend->upload(table, std::as_bytes(std::span(slot_of)), stream);
    }
    std::vector<Range> slots_in(const Table& slot_of) const {
        std::vector<Range> ranges;
        for (const std::int32_t slot : slot_of) {
            if (slot >= 0) ranges.push_back(range_of(slab.slot(slot).data, slab.slot(slot).bytes));
        }
        return ranges;
    }
    void compute(const std::vector<Range>& slots, cudaStream_t stream) const {
        check(cudaMemsetAsync(pairs.data, 0, pairs.bytes, stream), "test");
        backend->gather_mlp_resident(op, slots, workspace, stream);
        combine(op.out, op.tokens, op.top_k, p.c.Ho, result.data, F32, false, stream);
    }
    // Pairs of this step, kept without the host waiting for them.
    void note(std::size_t step, cudaStream_t stream) const {
        check(cudaMemcpyAsync(log.data + step * pairs.bytes, pairs.data, pairs.bytes, cudaMemcpyDeviceToDevice, stream),
              "test");
    }
    std::vector<float> noted(std::size_t step, cudaStream_t stream) const {
        return floats(log.data + step * pairs.bytes, pairs.bytes, stream);
    }
    std::vector<float> floats(const std::byte* from, std::size_t bytes, cudaStream_t stream) const {
        std::vector<float> host(bytes / sizeof(float));
        backend->download(std::as_writable_bytes(std::span(host)), from, stream);
        return host;
    }
    // The pairs of the experts that the table has, from the path whose table is the host's.
    std::vector<float> expected(const Table& slot_of) const {
        const Layer whole(op.tokens, p.c.E);
        Table all(slot_of.size(), -1);
        for (std::size_t e = 0; e < all.size(); ++e) {
            if (slot_of[e] < 0) continue;
            whole.load(e, static_cast<std::int64_t>(e));
            all[e] = static_cast<std::int32_t>(e);
        }
        GatherMlp call = p.op(whole.op.out, OutMode::kPairs);
        call.slab = whole.op.slab;
        call.slot_bytes = whole.op.slot_bytes;
        call.slot_of = all;
        call.hidden = whole.op.hidden;
        call.index = whole.op.index;
        call.weights = whole.op.weights;
        whole.backend->gather_mlp(call, nullptr);
        return whole.floats(whole.pairs.data, whole.pairs.bytes, nullptr);
    }

    static constexpr std::size_t kSteps = 10;
    Problem p;
    std::shared_ptr<CudaBackend> backend;
    Slab slab;
    PinnedBuffer records;
    Mlp op;
    std::size_t elements = 0;
    Memory table, pairs, result, workspace, log;
};

// Steps that each give a slot to another expert; `step` computes with the table as it then is.
void check_steps(const Layer& layer, cudaStream_t stream, const std::function<void(const std::vector<Range>&)>& step) {
    std::mt19937 random(5);
    Table slot_of(5, -1);
    std::vector<std::size_t> held(3, 5);  // expert in each slot; 5: none
    std::vector<Table> tables;
    for (std::size_t i = 0; i < Layer::kSteps; ++i) {
        const std::size_t slot = i % 3;
        std::size_t expert = random() % 5;
        while (slot_of[expert] >= 0) expert = (expert + 1) % 5;
        if (held[slot] < 5) slot_of[held[slot]] = -1;
        held[slot] = expert;
        slot_of[expert] = static_cast<std::int32_t>(slot);
        emu::slow_copies(3000);  // longer than the kernels take, so that one that does not wait reads too soon
        layer.load(expert, static_cast<std::int64_t>(slot), i % 2 ? Lane::kDemand : Lane::kPrefetch);
        emu::slow_copies(0);
        layer.set_table(slot_of, stream);
        step(layer.slots_in(slot_of));
        layer.note(i, stream);
        tables.push_back(slot_of);
    }
    for (std::size_t i = 0; i < tables.size(); ++i) CHECK(layer.noted(i, stream) == layer.expected(tables[i]));
}

std::optional<cudaStreamCaptureStatus> status_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status{};
    return cudaStreamIsCapturing(stream, &status) == cudaSuccess ? std::optional(status) : std::nullopt;
}

}  // namespace

TEST("a captured call and combine give on replay the bits of the same call uncaptured, on both paths") {
    for (const std::int64_t tokens : kTokensOfPaths) {
        const Layer layer(tokens, 5);
        const ComputeStream stream;
        const Table table = {4, -1, 0, 2, 3};
        for (std::size_t e = 0; e < table.size(); ++e) {
            if (table[e] >= 0) layer.load(e, table[e]);
        }
        const std::vector<Range> slots = layer.slots_in(table);
        layer.set_table(table, stream);
        layer.compute(slots, stream);
        const std::vector<float> pairs = layer.floats(layer.pairs.data, layer.pairs.bytes, stream);
        const std::vector<float> sums = layer.floats(layer.result.data, layer.result.bytes, stream);
        CHECK(pairs == layer.expected(table));
        int absent = 0;
        for (std::size_t row = 0; row < layer.p.index.size(); ++row) {  // nobody adds to the pairs of an absent expert
            if (layer.p.index[row] != 1) continue;
            ++absent;
            const std::size_t token = row / 3;
            const auto ids = layer.p.index.begin() + static_cast<std::ptrdiff_t>(token * 3);
            const auto rank = static_cast<std::size_t>(
                std::count_if(ids, ids + 3, [&](std::int64_t id) { return id < layer.p.index[row]; }));
            CHECK_EQ(pairs[(token * 3 + rank) * 40], 0.0F);
        }
        CHECK(absent > 0);
        const CapturedGraph graph(stream, [&] { layer.compute(slots, stream); });
        for (int round = 0; round < 3; ++round) {
            for (const Memory memory : {layer.pairs, layer.result, layer.workspace}) {
                check(cudaMemsetAsync(memory.data, 0xFF, memory.bytes, stream), "test");
            }
            layer.backend->begin_read(slots, stream);
            graph.replay(stream);
            layer.backend->end_read(slots, stream);
            CHECK(layer.floats(layer.pairs.data, layer.pairs.bytes, stream) == pairs);
            CHECK(layer.floats(layer.result.data, layer.result.bytes, stream) == sums);
        }
    }
}

TEST("a replay uses the table and the slots as they are by then, and copies into slots wait for the replay before") {
    for (const std::int64_t tokens : kTokensOfPaths) {
        const Layer layer(tokens, 3);
        const ComputeStream stream;
        const CapturedGraph graph(stream, [&] { layer.compute(layer.slots_in({0, 1, 2}), stream); });
        check_steps(layer, stream, [&](const std::vector<Range>& slots) {
            layer.backend->begin_read(slots, stream);
            graph.replay(stream);
            layer.backend->end_read(slots, stream);
        });
    }
}

TEST("an uncaptured call runs after the copies into its slots and before the next ones") {
    for (const std::int64_t tokens : kTokensOfPaths) {
        const Layer layer(tokens, 3);
        const ComputeStream stream;
        check_steps(layer, stream, [&](const std::vector<Range>& slots) { layer.compute(slots, stream); });
    }
}

TEST("a copy into a slot waits for a replay that reads it, also where two slots are read as one range") {
    const Layer layer(3, 2);
    const ComputeStream stream;
    const std::array<const std::byte*, 2> slots = {layer.slab.slot(0).data, layer.slab.slot(1).data};
    const std::array<Range, 1> both = {range_of(slots[0], 2 * layer.slab.slot(0).bytes)};
    const std::size_t last = static_cast<std::size_t>(layer.p.slot_bytes) - 1;
    std::vector<std::byte> seen;
    const CapturedGraph graph(stream, [&] {
        emu::enqueue(stream, [&seen, slots, last] {
            for (const std::byte* slot : slots) seen.push_back(slot[0]);
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            for (const std::byte* slot : slots) seen.push_back(slot[last]);
        });
    });
    std::vector<std::byte> expected;
    std::array<const std::byte*, 2> held{};
    for (std::size_t step = 0; step < 13; ++step) {
        layer.load(step % 5, static_cast<std::int64_t>(step % 2), step % 3 ? Lane::kDemand : Lane::kPrefetch);
        held[step % 2] = layer.records.data() + layer.p.slot_of[step % 5] * layer.p.slot_bytes;
        if (step == 0) continue;
        layer.backend->begin_read(both, stream);
        graph.replay(stream);
        layer.backend->end_read(both, stream);
        for (const std::size_t at : {std::size_t{0}, last}) {
            for (const std::byte* record : held) expected.push_back(record[at]);
        }
    }
    check(cudaStreamSynchronize(stream), "test");
    CHECK(seen == expected);
}

TEST("a call that fails half-way leaves nothing behind that reads its slots") {
    const Layer layer(3, 1);
    const ComputeStream stream;
    const Table first = {0, -1, -1, -1, -1}, second = {-1, 0, -1, -1, -1};
    for (int round = 0; round < 4; ++round) {
        layer.load(0, 0);
        layer.set_table(first, stream);
        check(cudaMemsetAsync(layer.pairs.data, 0, layer.pairs.bytes, stream), "test");
        emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);  // behind the kernels
        CHECK_ERROR(ErrorKind::kTransfer,
                    layer.backend->gather_mlp_resident(layer.op, layer.slots_in(first), layer.workspace, stream));
        emu::fail(nullptr, 0, cudaSuccess);
        layer.load(1, 0);
        CHECK(layer.floats(layer.pairs.data, layer.pairs.bytes, stream) == layer.expected(first));
        layer.set_table(second, stream);
        layer.compute(layer.slots_in(second), stream);
        CHECK(layer.floats(layer.pairs.data, layer.pairs.bytes, stream) == layer.expected(second));
    }
}

TEST("what cannot be in a graph is refused and leaves the capture as it was") {
    const Layer layer(3, 1);
    const ComputeStream stream;
    const Table table = {0, -1, -1, -1, -1};
    std::vector<std::byte> host(16);
    GatherMlp call = layer.p.op(layer.op.out, OutMode::kPairs);
    call.slot_of = table;
    const auto refused = [&](const Error& error, const std::string& word) {
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kTransfer));
        CHECK(error.message.find("the stream captures a graph; ") == 0);
        CHECK(error.message.find(word) != std::string::npos);
        CHECK(capturing(stream));
    };
    const std::vector<Range> slots = layer.slots_in(table);
    begin(stream);
    refused(ERROR_OF(layer.backend->gather_mlp(call, stream)), "slot table is the host's");
    refused(ERROR_OF(layer.backend->upload(layer.table, host, stream)), "replay would copy");
    refused(ERROR_OF(layer.backend->write_table(layer.table, std::vector<std::int32_t>{1}, stream)), "as it is now");
    refused(ERROR_OF(layer.backend->download(host, layer.table.data, stream)), "host cannot wait");
    refused(ERROR_OF(layer.backend->begin_read(slots, stream)), "around its replays");
    refused(ERROR_OF(layer.backend->end_read(slots, stream)), "around its replays");
    layer.compute(slots, stream);
    CHECK_EQ(end(stream), cudaSuccess);
    CHECK(!capturing(stream));
    layer.backend->upload(layer.table, host, stream);
}

TEST("an error that a failed call leaves behind is not the next call's") {
    const Layer layer(12, 1);
    const ComputeStream stream;
    layer.set_table(Table(5, -1), stream);
    emu::fail("cudaEventRecord", 1, cudaErrorLaunchFailure);
    emu::fail("cudaStreamSynchronize", 1, cudaErrorIllegalAddress);
    CHECK_ERROR(ErrorKind::kTransfer, layer.compute({}, stream));
    emu::fail(nullptr, 0, cudaSuccess);
    layer.compute({}, stream);
    CHECK_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST("the default stream is not taken for one that captures while another, blocking one does") {
    emu::fail("cudaStreamIsCapturing", 1, cudaErrorStreamCaptureImplicit);
    CHECK(!capturing(nullptr));
    emu::fail(nullptr, 0, cudaSuccess);
    CHECK_EQ(cudaGetLastError(), cudaSuccess);
}

TEST("calls that contradict themselves are refused with the value, also in a capture") {
    const Layer layer(12, 1);
    const ComputeStream stream;
    const auto refused = [&](Mlp op, Memory workspace, const std::string& word) {
        const Error error = ERROR_OF(layer.backend->gather_mlp_resident(op, {}, workspace, stream));
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kConfig));
        CHECK(error.message.find(word) != std::string::npos);
    };
    const std::size_t needed = layer.workspace.bytes;
    for (const bool captured : {false, true}) {
        if (captured) begin(stream);
        Mlp no_table = layer.op;
        no_table.slot_of = nullptr;
        refused(no_table, layer.workspace, "slot_of is at address 0");
        refused(layer.op, {nullptr, needed, false}, "the workspace is at address 0");
        refused(layer.op, {layer.workspace.data, needed - 1, false},
                "a workspace of " + std::to_string(needed - 1) + " bytes is too small for this call, which needs " +
                    std::to_string(needed));
        refused(layer.op, {layer.workspace.data + 128, needed, false}, "is not 256-byte aligned");
        Mlp many = layer.op;
        many.experts = 9000;
        refused(many, layer.workspace, "experts=9000");
        if (captured) CHECK_EQ(end(stream), cudaSuccess);
    }
}

TEST("a capture that an error has invalidated is said to be, and the stream works again when it has ended") {
    const Layer layer(3, 1);
    const ComputeStream stream;
    begin(stream);
    const Error error = ERROR_OF(layer.backend->allocate(100));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kTransfer));
    CHECK(error.message.find("cudaErrorStreamCaptureUnsupported") == 0);
    CHECK(error.message.find("while allocating 100 bytes on device 0") != std::string::npos);
    const Error late = ERROR_OF(layer.backend->gather_mlp_resident(layer.op, {}, layer.workspace, stream));
    CHECK_EQ(static_cast<int>(late.kind), static_cast<int>(ErrorKind::kTransfer));
    CHECK(late.message.find("an earlier error has invalidated") != std::string::npos);
    CHECK_ERROR(ErrorKind::kTransfer, capturing(stream));
    CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);
    CHECK(!capturing(stream));
    layer.set_table({0, -1, -1, -1, -1}, stream);
    layer.load(0, 0);
    layer.compute(layer.slots_in({0}), stream);
    CHECK(layer.floats(layer.pairs.data, layer.pairs.bytes, stream) == layer.expected({0, -1, -1, -1, -1}));
}

TEST("memory that is given back while a stream captures stays until the backend goes") {
    const std::uint64_t before = emu::counters().device_bytes;
    {
        const auto backend = std::make_shared<CudaBackend>(0);
        const ComputeStream stream;
        auto slab = std::make_unique<Slab>(backend, 1, 4096);
        begin(stream);
        slab.reset();
        CHECK_EQ(emu::counters().device_bytes, before + 4096);
        CHECK_EQ(cudaGetLastError(), cudaSuccess);
        CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);  // the attempt to wait is an error to the runtime
    }
    CHECK_EQ(emu::counters().device_bytes, before);
}

TEST("of the fake runtime: an event of a capture is no point in time, and one from outside is none of the graph") {
    const ComputeStream stream, other;
    cudaEvent_t inside = nullptr, outside = nullptr;
    for (cudaEvent_t* event : {&inside, &outside}) check(cudaEventCreateWithFlags(event, 0), "test");
    check(cudaEventRecord(outside, other), "test");
    begin(stream);
    check(cudaEventRecord(inside, stream), "test");
    CHECK_EQ(cudaStreamWaitEvent(stream, inside, 0), cudaSuccess);
    CHECK_EQ(end(stream), cudaSuccess);
    CHECK_EQ(cudaStreamWaitEvent(other, inside, 0), cudaErrorCapturedEvent);
    CHECK_EQ(cudaEventQuery(inside), cudaErrorCapturedEvent);
    CHECK_EQ(cudaEventSynchronize(inside), cudaErrorCapturedEvent);
    begin(stream);
    CHECK_EQ(cudaStreamWaitEvent(stream, outside, 0), cudaErrorStreamCaptureIsolation);
    CHECK_EQ(cudaStreamWaitEvent(stream, inside, 0), cudaErrorStreamCaptureInvalidated);
    CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);
    for (cudaEvent_t event : {inside, outside}) check(cudaEventDestroy(event), "test");
}

TEST("of the fake runtime: a stream that waits for a captured event joins the capture, and has to be waited for") {
    const ComputeStream stream, other;
    cudaEvent_t fork = nullptr, join = nullptr;
    for (cudaEvent_t* event : {&fork, &join}) check(cudaEventCreateWithFlags(event, 0), "test");
    int runs = 0;
    for (const bool joined : {false, true}) {
        begin(stream);
        check(cudaEventRecord(fork, stream), "test");
        CHECK_EQ(cudaStreamWaitEvent(other, fork, 0), cudaSuccess);
        CHECK_EQ(status_of(other) == cudaStreamCaptureStatusActive, true);
        emu::enqueue(other, [&runs] { ++runs; });
        check(cudaEventRecord(join, other), "test");
        if (joined) check(cudaStreamWaitEvent(stream, join, 0), "test");
        CHECK_EQ(end(stream), joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
        CHECK_EQ(status_of(other) == cudaStreamCaptureStatusNone, true);
        check(cudaStreamSynchronize(other), "test");
    }
    CHECK_EQ(runs, 0);
    for (cudaEvent_t event : {fork, join}) check(cudaEventDestroy(event), "test");
}

TEST("of the fake runtime: who may wait, and who may end a capture, is a matter of threads and modes") {
    const ComputeStream stream, other;
    const auto elsewhere = [](const std::function<cudaError_t()>& call, cudaStreamCaptureMode mode) {
        cudaError_t code = cudaSuccess;
        std::thread([&] {
            cudaThreadExchangeStreamCaptureMode(&mode);
            code = call();
        }).join();
        return code;
    };
    const auto wait = [&] { return cudaStreamSynchronize(other); };
    begin(stream, cudaStreamCaptureModeGlobal);
    CHECK_EQ(elsewhere(wait, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    CHECK_EQ(elsewhere([&] { return end(stream); }, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureWrongThread);
    CHECK(capturing(stream));
    CHECK_EQ(elsewhere(wait, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
    CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);
    begin(stream, cudaStreamCaptureModeThreadLocal);
    CHECK_EQ(elsewhere(wait, cudaStreamCaptureModeGlobal), cudaSuccess);
    CHECK_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
    CHECK_EQ(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
    CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);
    begin(stream, cudaStreamCaptureModeRelaxed);
    CHECK_EQ(wait(), cudaSuccess);
    CHECK_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
    CHECK_EQ(end(stream), cudaErrorStreamCaptureInvalidated);
    CHECK_EQ(end(stream), cudaErrorIllegalState);
}

EMOE_TEST_MAIN
