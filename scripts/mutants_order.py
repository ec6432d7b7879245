"""Mutants of order: stream waits, event records, reuse of slots and of pinned memory. Run by cuda_mutants.py."""

from __future__ import annotations

from cuda_mutants import Mutant

BACKEND = ("test_cuda_backend",)
BOTH = ("test_cuda_backend", "test_cuda_queue")
GRAPH = ("test_cuda_graph",)
HAZARDS, RUNTIME = "csrc/cuda/hazards.cpp", "csrc/cuda/runtime.cpp"
DEVICE, COMPUTE = "csrc/cuda/cuda_backend.cpp", "csrc/cuda/cuda_compute.cpp"
STORE, QUEUE = "csrc/cuda/pinned_cache.cpp", "csrc/cuda/device_queue.cpp"

MUTANTS = [
    Mutant(
        "a copy does not wait for the readers of its slot",
        HAZARDS,
        "    order(writes_, range, stream);\n    order(reads_, range, stream);\n",
        "    order(writes_, range, stream);\n",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "a copy does not wait for the copy of the other lane",
        HAZARDS,
        "    order(writes_, range, stream);\n    order(reads_, range, stream);\n",
        "    order(reads_, range, stream);\n",
        BACKEND,
    ),
    Mutant(
        "a kernel does not wait for the copy into its slot",
        HAZARDS,
        "cudaStream_t stream) {\n    const std::lock_guard<std::mutex> lock(mutex_);\n"
        "    order(writes_, range, stream);\n}",
        "cudaStream_t) {\n    const std::lock_guard<std::mutex> lock(mutex_);\n    (void)range;\n}",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "only the last of two readers is remembered",
        HAZARDS,
        "    drop_covered(reads_, range, [&](const Use& use) { return use.stream == stream; });\n",
        "    drop_covered(reads_, range, [](const Use&) { return true; });\n",
        BACKEND,
    ),
    Mutant(
        "the event of a copy is recorded before the copy",
        DEVICE,
        "            check(cudaMemcpyAsync(dst.data + at, src.data() + at, bytes, cudaMemcpyHostToDevice, stream), "
        '"copying ",\n                  bytes, " of ", src.size(), " bytes to device ", device_);\n'
        "            copied = events_->record(stream);\n",
        "            copied = events_->record(stream);\n"
        "            check(cudaMemcpyAsync(dst.data + at, src.data() + at, bytes, cudaMemcpyHostToDevice, stream), "
        '"copying ",\n                  bytes, " of ", src.size(), " bytes to device ", device_);\n',
        BOTH,
        quick=True,
    ),
    Mutant(
        "a copy into a slot is not remembered",
        DEVICE,
        "    hazards_.wrote(range, stream, copied);\n",
        "",
        BACKEND,
    ),
    Mutant(
        "a copy waits for nobody",
        DEVICE,
        "            if (at == 0) hazards_.before_write(range, stream);\n",
        "",
        BACKEND,
    ),
    Mutant(
        "a reader is not remembered",
        COMPUTE,
        "    for (const Range range : ranges) hazards_.read(range, stream, finished);\n",
        "    (void)ranges;\n",
        BACKEND,
    ),
    Mutant(
        "the event of a reader is recorded before the kernel",
        COMPUTE,
        "    begin_read(ranges, stream);\n",
        "    begin_read(ranges, stream);\n    end_read(ranges, stream);\n    if (!ranges.empty()) {\n"
        "        cuda::write_table(op.slot_of, reinterpret_cast<std::int32_t*>(scratch.table.data), stream);\n"
        "        route(call, scratch.workspace.data, stream);\n"
        "        cuda::gather_mlp(call, scratch.workspace.data, stream);\n        return;\n    }\n",
        BACKEND,
    ),
    Mutant(
        "order_after of a copy orders nothing",
        DEVICE,
        "    event_of(ticket).before(stream);\n",
        "    (void)event_of(ticket);\n    (void)stream;\n",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "wait does not wait for the copy",
        DEVICE,
        "void CudaBackend::wait(Ticket ticket) { event_of(ticket).synchronize(); }",
        "void CudaBackend::wait(Ticket ticket) { (void)event_of(ticket); }",
        BACKEND,
    ),
    Mutant(
        "the host writes a staging chunk that is in flight",
        DEVICE,
        "    copied_[at_].synchronize();\n",
        "",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "the copy out of a staging chunk is not remembered",
        DEVICE,
        "    copied_[at_] = std::move(copied);\n",
        "    (void)copied;\n",
        BACKEND,
    ),
    Mutant(
        "download reads the staging chunk before the copy has arrived",
        DEVICE,
        "        arrived.synchronize();\n",
        "",
        BACKEND,
    ),
    Mutant(
        "scratch is replaced while kernels use it",
        COMPUTE,
        '    check(cudaStreamSynchronize(stream), "waiting for a compute stream of device ", device_);\n',
        "    (void)stream;\n",
        BACKEND,
    ),
    Mutant(
        "device memory is freed while kernels use it",
        DEVICE,
        '        check(cudaDeviceSynchronize(), "waiting for device ", device_);\n',
        "",
        BACKEND,
    ),
    Mutant(
        "cleared memory is handed out before it is clear",
        DEVICE,
        "        demand.stream->synchronize();\n",
        "",
        BACKEND,
    ),
    Mutant(
        "what a failed call has enqueued is not waited for",
        "csrc/cuda/runtime.hpp",
        "        cudaStreamSynchronize(stream);\n",
        "        (void)stream;\n",
        BACKEND,
    ),
    Mutant(
        "an error that is left of a failed call is the next call's",
        "csrc/cuda/runtime.hpp",
        "        cudaGetLastError();  // or the next launch would be blamed\n",
        "",
        GRAPH,
    ),
    Mutant(
        "a lane has no bound of bytes in flight, so that a demand waits for a whole prefetch",
        DEVICE,
        "lane.bytes + bytes <= lane.bound) return true;",
        "lane.bytes + bytes <= 1000000 * lane.bound) return true;",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "a copy is made in one piece",
        DEVICE,
        "std::min(options_.piece_bytes, src.size() - at)",
        "std::max(std::min(options_.piece_bytes, src.size() - at), src.size() - at)",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "bytes in flight are never counted off",
        DEVICE,
        "        lane.bytes -= lane.in_flight.front().second;\n",
        "",
        ("test_cuda_queue",),
    ),
    Mutant(
        "a slot table is a copy on the compute stream",
        COMPUTE,
        "        cuda::write_table(op.slot_of, reinterpret_cast<std::int32_t*>(scratch.table.data), stream);\n",
        "        const std::lock_guard<std::mutex> staging_lock(staging_mutex_);\n"
        "        std::byte* const chunk = staging_.next();\n"
        "        std::memcpy(chunk, op.slot_of.data(), op.slot_of.size_bytes());\n"
        "        check(cudaMemcpyAsync(scratch.table.data, chunk, op.slot_of.size_bytes(), cudaMemcpyHostToDevice,"
        ' stream), "");\n'
        "        staging_.sent(events_->record(stream));\n",
        BACKEND,
        quick=True,
    ),
    Mutant(
        "the parts of a slot table after the first are not written",
        "csrc/cuda/gather_mlp.cu",
        "first < slot_of.size(); first += kTableChunk",
        "first == 0; first += kTableChunk",
        ("test_cuda_kernels",),
    ),
    Mutant(
        "what pinned memory holds waits for a worker",
        QUEUE,
        "lane == Lane::kDemand ? store_->acquire_ready(record) : std::nullopt",
        "lane == Lane::kDemand && record < 0 ? store_->acquire_ready(record) : std::nullopt",
        ("test_cuda_queue",),
    ),
    Mutant(
        "the copy that submit makes is not remembered by its pinned slot",
        QUEUE,
        "        store_->release(lease.slot, *copied);\n",
        "        store_->release(lease.slot);\n",
        ("test_cuda_queue",),
        quick=True,
    ),
    Mutant(
        "submit waits for room in the lane",
        DEVICE,
        "if (!one_at_a_time || src.size() > on.bound || !has_room(on, src.size())) return std::nullopt;",
        "if (!one_at_a_time || src.size() > on.bound) return std::nullopt;",
        ("test_cuda_queue",),
    ),
    Mutant(
        "closing does not wait for copies",
        DEVICE,
        "        for (const auto& [copied, bytes] : each.in_flight) copied.synchronize();\n",
        "",
        BOTH,
    ),
    Mutant(
        "a stream wait is never given to the stream",
        RUNTIME,
        '    if (handle_) check(cudaStreamWaitEvent(stream, handle_.get(), 0), "ordering a stream after an event");\n',
        "    (void)stream;\n",
        BOTH,
    ),
    Mutant(
        "an event that is not over is taken for over",
        RUNTIME,
        "    if (code == cudaErrorNotReady) return false;\n",
        "    if (code == cudaErrorNotReady) return true;\n",
        BOTH,
    ),
    Mutant(
        "a pooled event goes back while others still wait for it, and is recorded anew",
        RUNTIME,
        "    event.handle_ = std::shared_ptr",
        "    {\n        const std::lock_guard<std::mutex> lock(mutex_);\n        idle_.push_back(handle);\n    }\n"
        "    event.handle_ = std::shared_ptr",
        BOTH,
    ),
    Mutant(
        "the host fills a pinned slot that a copy still reads",
        STORE,
        "            for (const Event& copied : copies) copied.synchronize();"
        "  // the host is about to write what they read\n",
        "            (void)copies;\n",
        BOTH,
        quick=True,
    ),
    Mutant(
        "the copy out of a pinned slot is not remembered",
        STORE,
        "        used.copies.push_back(std::move(copied));\n",
        "",
        BOTH,
    ),
    Mutant(
        "a pinned slot is given away while somebody uses it",
        STORE,
        "        if (slot.state == State::kLoading || slot.users > 0) continue;\n",
        "        if (slot.state == State::kLoading) continue;\n",
        BOTH,
    ),
    Mutant(
        "a pinned slot is ready before it is filled",
        QUEUE,
        "    std::optional<RecordPump::Finished> finished;\n    try {",
        "    std::optional<RecordPump::Finished> finished;\n    store_->filled(lease.slot);\n    try {",
        BOTH,
    ),
    Mutant(
        "order_after of a record orders nothing",
        QUEUE,
        "    job->copied.before(stream);\n",
        "    (void)stream;\n",
        ("test_cuda_queue",),
        quick=True,
    ),
    Mutant(
        "wait for a record does not wait for its copy",
        QUEUE,
        "    job->copied.synchronize();\n",
        "",
        ("test_cuda_queue",),
    ),
    Mutant(
        "a failed read leaves its pinned slot filled",
        QUEUE,
        "        store_->failed(lease.slot);\n        throw *finished->error;\n",
        "        store_->filled(lease.slot);\n        throw *finished->error;\n",
        ("test_cuda_queue",),
    ),
    Mutant(
        "a queue goes without waiting for its copies",
        QUEUE,
        "    if (backend_) backend_->finish_copies();\n",
        "",
        ("test_cuda_queue",),
    ),
    Mutant(
        "the queue's workers take part in a capture",
        QUEUE,
        "    cudaThreadExchangeStreamCaptureMode(&mode);\n",
        "    (void)mode;\n",
        ("test_cuda_queue",),
    ),
    Mutant(
        "a long range that is read is not found from its middle",
        HAZARDS,
        "    uses.longest = std::max(uses.longest, range.end - range.begin);\n",
        "",
        GRAPH,
    ),
    Mutant(
        "a resident call does not wait for the copies into its slots",
        COMPUTE,
        "    begin_read(slots, stream);\n",
        "",
        GRAPH,
        quick=True,
    ),
    Mutant(
        "a resident call is not remembered as a reader",
        COMPUTE,
        "        launch();\n        end_read(slots, stream);\n",
        "        launch();\n",
        GRAPH,
        quick=True,
    ),
    Mutant(
        "the event of a resident call is recorded before its kernels",
        COMPUTE,
        "        launch();\n        end_read(slots, stream);\n",
        "        end_read(slots, stream);\n        launch();\n",
        GRAPH,
    ),
    Mutant(
        "what a failed resident call has enqueued is not waited for",
        COMPUTE,
        "    all_or_over(stream, [&] {\n        launch();\n        end_read(slots, stream);\n    });\n",
        "    launch();\n    end_read(slots, stream);\n",
        GRAPH,
    ),
    Mutant(
        "a captured call is ordered as if it ran at once",
        COMPUTE,
        "    if (capturing(stream)) {\n        launch();",
        "    if (capturing(stream)) {\n        for (const Range slot : slots) hazards_.before_read(slot, stream);\n"
        "        launch();\n        const Event finished = events_->record(stream);\n"
        "        for (const Range slot : slots) hazards_.read(slot, stream, finished);",
        GRAPH,
    ),
    Mutant(
        "a workspace that is too small is used",
        COMPUTE,
        "    if (workspace.bytes < needed) {",
        "    if (workspace.bytes + 1 < needed) {",
        GRAPH,
    ),
    Mutant(
        "a slot table of the host's gets into a graph",
        COMPUTE,
        """    refuse_capture(stream, "a call whose slot table is the host's cannot be in it");\n""",
        "",
        GRAPH,
    ),
    Mutant(
        "an upload gets into a graph",
        DEVICE,
        """    refuse_capture(stream, "a replay would copy what the host's memory then holds");\n""",
        "",
        GRAPH,
    ),
    Mutant(
        "a slot table that is written gets into a graph",
        COMPUTE,
        '    refuse_capture(stream, "a replay would write the table as it is now");\n',
        "",
        GRAPH,
    ),
    Mutant(
        "a download gets into a graph",
        DEVICE,
        '    refuse_capture(stream, "the host cannot wait for a copy that only a replay makes");\n',
        "",
        GRAPH,
    ),
    Mutant(
        "begin_read gets into a graph",
        COMPUTE,
        "    refuse_capture(stream, kAroundReplays);\n    for (const Range range : ranges) hazards_.before_read",
        "    for (const Range range : ranges) hazards_.before_read",
        GRAPH,
    ),
    Mutant(
        "end_read gets into a graph",
        COMPUTE,
        "    refuse_capture(stream, kAroundReplays);\n    const Event finished",
        "    const Event finished",
        GRAPH,
    ),
    Mutant(
        "an invalidated capture is taken for none",
        RUNTIME,
        "    if (status == cudaStreamCaptureStatusInvalidated) {",
        "    if (status == cudaStreamCaptureStatusInvalidated && stream == nullptr) {",
        GRAPH,
    ),
    Mutant(
        "memory that cannot be waited for is forgotten",
        DEVICE,
        '        check(cudaDeviceSynchronize(), "waiting for device ", device_);\n',
        "        cudaDeviceSynchronize();\n",
        GRAPH,
    ),
]
