// Fake CUDA runtime, third part: capture of streams into graphs, and their launch. What a capturing stream gets is kept
// and not run; a launch gives all of it to a stream, again each time. Forks are kept in the order of the calls, not as
// branches that may overlap. NVIDIA does not list the calls that a capture forbids to a thread; here it is all that
// allocate, free or wait.
#include <algorithm>
#include <map>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "cudart_internal.hpp"

namespace emu {

struct Capture {
    Stream* origin;
    std::thread::id thread;
    cudaStreamCaptureMode mode;
    bool invalidated = false;
    std::vector<std::function<void()>> work;
    std::map<const Stream*, std::uint64_t> calls;    // of each stream that takes part
    std::map<const Stream*, std::uint64_t> awaited;  // ... how many of them the origin's later work comes after
};

namespace {

struct Graph {
    std::vector<std::function<void()>> work;
    Recording* launched = nullptr;  // launches of one graph run one after another, in whatever streams
};

struct Captures {  // never destroyed, as the streams
    std::mutex mutex;
    std::map<const Stream*, Capture*> of;  // also of streams that joined by waiting for a captured event
    std::set<Capture*> active;
    std::vector<Capture*> all;  // never freed: events go on naming them
    std::set<const void*> graphs, launchable;
};
Captures& captures() {
    static Captures* const all = new Captures;
    return *all;
}
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

Capture* capture_of(const Stream* stream) {
    const auto found = captures().of.find(stream);
    return found == captures().of.end() ? nullptr : found->second;
}

cudaError_t invalidate(Capture* capture, cudaError_t code) {
    capture->invalidated = true;
    return code;
}

bool forbids(const Capture& capture) {
    if (capture.thread == std::this_thread::get_id()) {
        return capture.mode != cudaStreamCaptureModeRelaxed && mode_of_thread != cudaStreamCaptureModeRelaxed;
    }
    return capture.mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
}

cudaError_t refuse_where(const std::function<bool(const Capture&)>& refused) {
    cudaError_t code = cudaSuccess;
    for (Capture* const each : captures().active) {
        if (refused(*each)) code = invalidate(each, cudaErrorStreamCaptureUnsupported);
    }
    return code;
}

}  // namespace

bool in_capture(const Stream* on) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    return capture_of(on) != nullptr;
}

cudaError_t give(Stream* on, std::function<void()> work) {
    {
        const Quiet quiet;
        const std::lock_guard<std::mutex> guard(captures().mutex);
        Capture* const capture = capture_of(on);
        if (capture != nullptr) {
            if (capture->invalidated) return cudaErrorStreamCaptureInvalidated;
            ++capture->calls[on];
            capture->work.push_back(std::move(work));
            return cudaSuccess;
        }
    }
    on->push(std::move(work));
    return cudaSuccess;
}

cudaError_t capture_record(Stream* on, Recording* recording) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    recording->inside = capture_of(on);
    if (recording->inside == nullptr) return cudaSuccess;
    if (recording->inside->invalidated) return cudaErrorStreamCaptureInvalidated;
    recording->on = on;
    recording->calls = recording->inside->calls[on];
    return cudaSuccess;
}

cudaError_t capture_wait(Stream* on, const Recording* recording) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    Capture* const waits = capture_of(on);
    if (waits != nullptr && waits->invalidated) return cudaErrorStreamCaptureInvalidated;
    if (recording == nullptr) return cudaSuccess;
    Capture* const inside = recording->inside;
    if (waits == nullptr && inside == nullptr) return cudaSuccess;
    if (inside == nullptr) return invalidate(waits, cudaErrorStreamCaptureIsolation);
    if (captures().active.count(inside) == 0) {
        return waits == nullptr ? cudaErrorCapturedEvent : invalidate(waits, cudaErrorStreamCaptureIsolation);
    }
    if (waits == nullptr) {
        captures().of[on] = inside;
        ++inside->calls[on];
    } else if (waits != inside) {
        invalidate(inside, cudaErrorStreamCaptureMerge);
        return invalidate(waits, cudaErrorStreamCaptureMerge);
    } else if (on == inside->origin) {
        std::uint64_t& awaited = inside->awaited[recording->on];
        awaited = std::max(awaited, recording->calls);
    }
    return cudaSuccess;
}

cudaError_t may_wait(const Recording* recording) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    Capture* const inside = recording == nullptr ? nullptr : recording->inside;
    if (inside != nullptr) return invalidate(inside, cudaErrorCapturedEvent);
    return refuse_where(forbids);
}

cudaError_t may_wait(const Stream* stream) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    Capture* const capture = capture_of(stream);
    if (capture == nullptr) return refuse_where(forbids);
    return invalidate(capture,
                      capture->invalidated ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnsupported);
}

cudaError_t may_wait_for_device(int device) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    return refuse_where([&](const Capture& each) { return each.origin->device == device; });
}

cudaError_t may_allocate() { return may_wait(static_cast<const Recording*>(nullptr)); }

}  // namespace emu

using emu::Capture;
using emu::captures;
using emu::Graph;
using emu::Quiet;
using emu::returned;

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, emu::mode_of_thread);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    EMU_ENTER(cudaStreamBeginCapture);
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    if (stream == nullptr || stream == cudaStreamLegacy) return returned(cudaErrorStreamCaptureUnsupported);
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    if (emu::capture_of(on) != nullptr) return returned(cudaErrorIllegalState);
    auto* const capture = new Capture;
    capture->origin = on;
    capture->thread = std::this_thread::get_id();
    capture->mode = mode;
    captures().of[on] = capture;
    captures().active.insert(capture);
    captures().all.push_back(capture);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    EMU_ENTER(cudaStreamIsCapturing);
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    const Capture* const capture = emu::capture_of(on);
    *status = capture == nullptr     ? cudaStreamCaptureStatusNone
              : capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    EMU_ENTER(cudaStreamEndCapture);
    *graph = nullptr;
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    Capture* const capture = emu::capture_of(on);
    if (capture == nullptr) return returned(cudaErrorIllegalState);
    if (capture->origin != on) return returned(emu::invalidate(capture, cudaErrorStreamCaptureUnmatched));
    if (capture->thread != std::this_thread::get_id() && capture->mode != cudaStreamCaptureModeRelaxed) {
        return returned(cudaErrorStreamCaptureWrongThread);
    }
    captures().active.erase(capture);
    std::erase_if(captures().of, [&](const auto& each) { return each.second == capture; });
    if (capture->invalidated) return returned(cudaErrorStreamCaptureInvalidated);
    for (const auto& [each, calls] : capture->calls) {
        if (each != on && capture->awaited[each] < calls) return returned(cudaErrorStreamCaptureUnjoined);
    }
    auto* const made = new Graph{std::move(capture->work)};
    captures().graphs.insert(made);
    *graph = reinterpret_cast<cudaGraph_t>(made);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    EMU_ENTER(cudaGraphInstantiate);
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    if (captures().graphs.count(graph) == 0) return returned(cudaErrorInvalidValue);
    auto* const made = new Graph{reinterpret_cast<const Graph*>(graph)->work};
    captures().launchable.insert(made);
    *exec = reinterpret_cast<cudaGraphExec_t>(made);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EMU_ENTER(cudaGraphLaunch);
    emu::Stream* const on = emu::live_stream(stream);
    if (on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    auto* const graph = reinterpret_cast<Graph*>(exec);
    emu::Recording* const over = emu::new_recording();
    emu::Recording* before;
    {
        const Quiet quiet;
        const std::lock_guard<std::mutex> guard(captures().mutex);
        if (captures().launchable.count(exec) == 0) return returned(cudaErrorInvalidValue);
        if (emu::capture_of(on) != nullptr) {  // a graph inside a graph is not modelled
            return returned(emu::invalidate(emu::capture_of(on), cudaErrorStreamCaptureUnsupported));
        }
        before = std::exchange(graph->launched, over);
    }
    if (before != nullptr) on->push([before] { before->wait(); });
    for (const std::function<void()>& each : graph->work) on->push(each);
    on->push([over] { over->finish(); });
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    if (captures().graphs.erase(graph) == 0) return returned(cudaErrorInvalidValue);
    delete reinterpret_cast<Graph*>(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(captures().mutex);
    if (captures().launchable.erase(exec) == 0) return returned(cudaErrorInvalidValue);
    delete reinterpret_cast<Graph*>(exec);
    return cudaSuccess;
}

}  // extern "C"
