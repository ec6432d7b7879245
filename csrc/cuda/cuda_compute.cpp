// What CudaBackend gives to the caller's compute stream: calls of the kernels, between the copies before and after
// them. None of it is a copy, which would wait for those of experts: a device has one engine for all streams' copies.
#include <string>
#include <utility>

#include "core/error.hpp"
#include "cuda/cuda_backend.hpp"
#include "cuda/kernels.hpp"

namespace emoe::cuda {
namespace {

constexpr std::uintptr_t kWorkspaceAlignment = 256;  // kernels.hpp
constexpr const char* kAroundReplays = "begin_read and end_read belong around its replays";

Mlp on_device(const GatherMlp& op, const std::byte* table) {
    Mlp call;
    call.layout = op.layout;
    call.slab = op.slab;
    call.slot_bytes = op.slot_bytes;
    call.slot_of = reinterpret_cast<const std::int32_t*>(table);
    call.experts = static_cast<std::int64_t>(op.slot_of.size());
    call.hidden = op.hidden;
    call.hidden_dtype = op.hidden_dtype;
    call.tokens = op.tokens;
    call.index = op.index;
    call.weights = op.weights;
    call.weights_dtype = op.weights_dtype;
    call.top_k = op.top_k;
    call.out = op.out;
    return call;
}

}  // namespace

void CudaBackend::begin_read(std::span<const Range> ranges, cudaStream_t stream) {
    const DeviceScope scope(device_);
    refuse_capture(stream, kAroundReplays);
    for (const Range range : ranges) hazards_.before_read(range, stream);
}

void CudaBackend::end_read(std::span<const Range> ranges, cudaStream_t stream) {
    const DeviceScope scope(device_);
    refuse_capture(stream, kAroundReplays);
    const Event finished = events_->record(stream);
    for (const Range range : ranges) hazards_.read(range, stream, finished);
}

std::vector<Range> CudaBackend::slots_of(const GatherMlp& op) const {
    std::vector<Range> ranges;
    for (const std::int32_t slot : op.slot_of) {
        if (slot < 0) continue;
        ranges.push_back(range_of(op.slab + slot * op.slot_bytes, static_cast<std::size_t>(op.slot_bytes)));
    }
    return ranges;
}

// Memory of at least `bytes`; an old, smaller one is freed once the stream that used it is done with it.
Memory CudaBackend::grown(Memory memory, std::size_t bytes, cudaStream_t stream) {
    if (memory.bytes >= bytes) return memory;
    check(cudaStreamSynchronize(stream), "waiting for a compute stream of device ", device_);
    if (cudaFree(memory.data) != cudaSuccess) cudaGetLastError();  // or the next launch would be blamed
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "allocating ", bytes, " bytes of scratch on device ", device_);
    return {static_cast<std::byte*>(data), bytes, false};
}

void CudaBackend::gather_mlp(const GatherMlp& op, void* on) {
    const auto stream = static_cast<cudaStream_t>(on);
    refuse_lost_device();  // before a lock that a thread of the parent may have held
    validate(op);
    if (op.mode != OutMode::kPairs) {
        throw Error(ErrorKind::kConfig, "mode 'accumulate' is not computed on a CUDA device; use 'pairs' and combine");
    }
    const std::vector<Range> ranges = slots_of(op);
    if (ranges.empty() || op.tokens == 0 || op.top_k == 0) return;
    const std::lock_guard<std::mutex> lock(scratch_mutex_);
    const DeviceScope scope(device_);
    refuse_capture(stream, "a call whose slot table is the host's cannot be in it");
    Scratch& scratch = scratch_[stream];
    scratch.table = grown(std::exchange(scratch.table, {}), op.slot_of.size_bytes(), stream);
    Mlp call = on_device(op, scratch.table.data);
    scratch.workspace = grown(std::exchange(scratch.workspace, {}), workspace_bytes(call), stream);
    begin_read(ranges, stream);
    all_or_over(stream, [&] {
        cuda::write_table(op.slot_of, reinterpret_cast<std::int32_t*>(scratch.table.data), stream);
        route(call, scratch.workspace.data, stream);
        cuda::gather_mlp(call, scratch.workspace.data, stream);
        end_read(ranges, stream);
    });
}

void CudaBackend::write_table(Memory dst, std::span<const std::int32_t> slot_of, cudaStream_t stream) {
    refuse_lost_device();
    if (slot_of.size_bytes() > dst.bytes) {
        throw Error(ErrorKind::kConfig, "a slot table of " + std::to_string(slot_of.size()) +
                                            " experts does not fit into " + std::to_string(dst.bytes) + " bytes");
    }
    const DeviceScope scope(device_);
    refuse_capture(stream, "a replay would write the table as it is now");
    all_or_over(stream, [&] { cuda::write_table(slot_of, reinterpret_cast<std::int32_t*>(dst.data), stream); });
}

void CudaBackend::gather_mlp_resident(const Mlp& op, std::span<const Range> slots, Memory workspace,
                                      cudaStream_t stream) {
    const std::size_t needed = workspace_bytes(op);
    if (workspace.bytes < needed) {
        throw Error(ErrorKind::kConfig, "a workspace of " + std::to_string(workspace.bytes) +
                                            " bytes is too small for this call, which needs " + std::to_string(needed));
    }
    const auto address = reinterpret_cast<std::uintptr_t>(workspace.data);
    if (address % kWorkspaceAlignment != 0) {
        throw Error(ErrorKind::kConfig, "the workspace at address " + std::to_string(address) + " is not " +
                                            std::to_string(kWorkspaceAlignment) + "-byte aligned");
    }
    const DeviceScope scope(device_);
    const auto launch = [&] {
        route(op, workspace.data, stream);
        cuda::gather_mlp(op, workspace.data, stream);
    };
    if (capturing(stream)) {
        launch();  // nothing runs now: who replays the graph orders each replay
        return;
    }
    begin_read(slots, stream);
    all_or_over(stream, [&] {
        launch();
        end_read(slots, stream);
    });
}

}  // namespace emoe::cuda
