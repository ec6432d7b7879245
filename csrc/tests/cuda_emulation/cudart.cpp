// Fake CUDA runtime, first part: devices, streams and events. Links in place of libcudart, with NVIDIA's own
// prototypes. A stream is a worker thread with random delays; see cudart.hpp for what it does not model.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cudart_internal.hpp"

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#endif
#endif
#ifdef EMU_TSAN
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
}
#endif

namespace emu {

#ifdef EMU_TSAN
Quiet::Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
    AnnotateIgnoreSyncBegin("", 0);
}
Quiet::~Quiet() {
    AnnotateIgnoreSyncEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
}
#else
Quiet::Quiet() {}
Quiet::~Quiet() {}
#endif

void die(const char* message) {
    std::fprintf(stderr, "EMU ERROR: %s\n", message);
    std::fflush(stderr);
    std::_Exit(97);
}

void park(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
void unpark(std::atomic<std::uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

namespace {

struct State {  // never destroyed: workers may outlive static destructors
    std::mutex mutex;
    std::set<const void*> streams, events;
    std::vector<Stream*> ended;  // never freed: who ended it may still be inside push()
    std::map<int, Stream*> defaults;
    std::map<std::string, std::vector<std::pair<int, cudaError_t>>> faults;
    cudaError_t device_error = cudaSuccess;
    std::atomic<unsigned> seeds{0}, copy_us{0};
    std::atomic<Recording*> recordings{nullptr};
    std::atomic<std::uint64_t> copies{0}, waits{0}, in_flight{0}, most{0};
};
State& state() {
    static State* const all = new State;
    return *all;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;
thread_local Stream* running = nullptr;

}  // namespace

unsigned next_seed() {
    return static_cast<unsigned>(setting("EMU_SEED", 1)) * 7919U +
           state().seeds.fetch_add(1, std::memory_order_relaxed);
}

Stream::Stream(int device_) : device(device_), random_(next_seed()), longest_us_(setting("EMU_DELAY_US", 200)) {
    Node* const first = new Node;
    head_ = first;
    tail_.store(first, std::memory_order_relaxed);
    std::thread([this] { run(); }).detach();
}

void Stream::push(std::function<void()> work) {
    Node* node;
    {
        const Quiet quiet;
        node = new Node;
        node->work = std::move(work);
    }
    Node* const before = tail_.exchange(node, std::memory_order_relaxed);
    before->next.store(node, std::memory_order_release);
    pushes_.fetch_add(1, std::memory_order_relaxed);
    unpark(pushes_);
}

void Stream::stop() { push(nullptr); }

void Stream::delay() {
    const unsigned longest_us = running->longest_us_;
    if (longest_us == 0) return;
    const auto drawn = static_cast<unsigned>(running->random_());
    if (drawn % 3 != 0) std::this_thread::sleep_for(std::chrono::microseconds(drawn / 3 % longest_us));
}

void Stream::run() {
    running = this;
    for (;;) {
        Node* next;
        for (;;) {
            const std::uint32_t seen = pushes_.load(std::memory_order_relaxed);
            next = head_->next.load(std::memory_order_acquire);
            if (next != nullptr) break;
            park(pushes_, seen);
        }
        std::function<void()> work;
        {
            const Quiet quiet;
            delete head_;
            head_ = next;
            work = std::move(next->work);
        }
        if (!work) return;
        delay();
        work();
        const Quiet quiet;
        work = nullptr;
    }
}

void Recording::wait() {
    while (done.load(std::memory_order_acquire) == 0) park(done, 0);
}
void Recording::finish() {
    done.store(1, std::memory_order_release);
    unpark(done);
}

int current_device() { return device_of_thread; }
int devices() { return setting("EMU_DEVICES", 1); }

bool injected(const char* function, cudaError_t* code) {
    const Quiet quiet;
    State& all = state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    const auto found = all.faults.find(function);
    if (found == all.faults.end()) return false;
    for (auto& [left, result] : found->second) {
        if (left > 0 && --left == 0) {
            *code = result;
            return true;
        }
    }
    return false;
}

cudaError_t returned(cudaError_t code) {
    if (code != cudaSuccess && code != cudaErrorNotReady) last_error = code;
    return code;
}
void note_error(cudaError_t code) { last_error = code; }

void fail(const char* function, int nth, cudaError_t code) {
    const Quiet quiet;
    State& all = state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    if (function == nullptr) {
        all.faults.clear();
    } else {
        all.faults[function].emplace_back(nth, code);
    }
}

void pretend_device_error(cudaError_t code) { state().device_error = code; }

namespace {

// One in-order copy engine; waiting for a turn orders no memory, as waiting for a real one orders none.
struct Engine {
    std::atomic<std::uint32_t> next{0}, serving{0};
};
Engine& engine_of(int device) {
    static std::array<Engine, 8> engines;
    return engines.at(static_cast<std::size_t>(device));
}
std::atomic<unsigned> engine_us_per_kib{0};
std::atomic<std::uint32_t> engines_held{0};

struct Timeline {
    std::atomic<bool> keep{false};
    std::mutex mutex;
    std::vector<Span> spans;
};
Timeline& kept_timeline() {
    static auto* const all = new Timeline;
    return *all;
}

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Notes what runs while it lives.
class Kept {
  public:
    Kept(bool copy, const void* target, std::size_t bytes) {
        if (!kept_timeline().keep.load(std::memory_order_relaxed)) return;
        const Quiet quiet;
        const std::lock_guard<std::mutex> guard(kept_timeline().mutex);
        at_ = static_cast<std::ptrdiff_t>(kept_timeline().spans.size());
        const double now = seconds_now();
        kept_timeline().spans.push_back({copy, target, bytes, now, now});
    }
    ~Kept() {
        if (at_ < 0) return;
        const Quiet quiet;
        const std::lock_guard<std::mutex> guard(kept_timeline().mutex);
        const auto at = static_cast<std::size_t>(at_);
        if (at < kept_timeline().spans.size()) kept_timeline().spans[at].end = seconds_now();
    }
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;

  private:
    std::ptrdiff_t at_ = -1;
};

}  // namespace

void copy_engine(unsigned us_per_kib) { engine_us_per_kib.store(us_per_kib, std::memory_order_relaxed); }

void hold_engines(bool hold) {
    engines_held.store(hold ? 1 : 0, std::memory_order_relaxed);
    unpark(engines_held);
}

unsigned waiting_for_engine(int device) {
    Engine& engine = engine_of(device);
    return engine.next.load(std::memory_order_relaxed) - engine.serving.load(std::memory_order_relaxed);
}

void keep_timeline(bool keep) {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(kept_timeline().mutex);
    kept_timeline().spans.clear();
    kept_timeline().keep.store(keep, std::memory_order_relaxed);
}

std::vector<Span> timeline() {
    const Quiet quiet;
    const std::lock_guard<std::mutex> guard(kept_timeline().mutex);
    return kept_timeline().spans;
}

void through_engine(int device, const void* target, std::size_t bytes, const std::function<void()>& copy) {
    const unsigned us_per_kib = engine_us_per_kib.load(std::memory_order_relaxed);
    if (us_per_kib == 0) {
        const Kept kept(true, target, bytes);
        return copy();
    }
    Engine& engine = engine_of(device);
    const std::uint32_t mine = engine.next.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
        const std::uint32_t serving = engine.serving.load(std::memory_order_relaxed);
        if (serving == mine) break;
        park(engine.serving, serving);
    }
    while (engines_held.load(std::memory_order_relaxed) != 0) park(engines_held, 1);
    {
        const Kept kept(true, target, bytes);
        std::this_thread::sleep_for(std::chrono::microseconds(us_per_kib * (bytes >> 10)));
        copy();
    }
    engine.serving.fetch_add(1, std::memory_order_relaxed);
    unpark(engine.serving);
}

void slow_copies(unsigned us) { state().copy_us.store(us, std::memory_order_relaxed); }
unsigned copy_us() { return state().copy_us.load(std::memory_order_relaxed); }

void count_copy_begin() {
    State& all = state();
    all.copies.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t now = all.in_flight.fetch_add(1, std::memory_order_relaxed) + 1;
    std::uint64_t most = all.most.load(std::memory_order_relaxed);
    while (most < now && !all.most.compare_exchange_weak(most, now, std::memory_order_relaxed)) {
    }
}
void count_copy_end() { state().in_flight.fetch_sub(1, std::memory_order_relaxed); }

Counters counters() {
    const Quiet quiet;
    State& all = state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    return {all.copies.load(),    all.waits.load(), all.events.size(), all.streams.size(),
            all.in_flight.load(), all.most.load(),  device_bytes(),    pinned_bytes()};
}
void reset_counters() {
    State& all = state();
    all.copies = 0;
    all.waits = 0;
    all.most = all.in_flight.load();
}

Stream* live_stream(cudaStream_t stream) {
    const Quiet quiet;
    State& all = state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
        Stream*& found = all.defaults[current_device()];
        if (found == nullptr) found = new Stream(current_device());
        return found;
    }
    return all.streams.count(stream) != 0 ? reinterpret_cast<Stream*>(stream) : nullptr;
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
    Stream* const found = live_stream(stream);
    if (found == nullptr) die("work enqueued on a stream that does not exist");
    const cudaError_t code = give(found, [work = std::move(work)] {
        const Kept kept(false, nullptr, 0);
        work();
    });
    if (code != cudaSuccess) note_error(code);
}

Recording* new_recording() {
    const Quiet quiet;
    auto* const recording = new Recording;
    recording->previous = state().recordings.exchange(recording, std::memory_order_relaxed);
    return recording;
}

}  // namespace emu

using emu::Quiet;
using emu::returned;

namespace {

emu::Event* live_event(cudaEvent_t event) {
    const Quiet quiet;
    emu::State& all = emu::state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    return all.events.count(event) != 0 ? reinterpret_cast<emu::Event*>(event) : nullptr;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    EMU_ENTER(cudaGetDeviceCount);
    *count = 0;
    if (emu::state().device_error != cudaSuccess) return returned(emu::state().device_error);
    *count = emu::devices();
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = emu::current_device();
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    EMU_ENTER(cudaSetDevice);
    if (device < 0 || device >= emu::devices()) return returned(cudaErrorInvalidDevice);
    emu::device_of_thread = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = emu::state().device_error == cudaErrorInsufficientDriver ? 0 : CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    EMU_ENTER(cudaDeviceGetAttribute);
    if (device < 0 || device >= emu::devices()) return returned(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            return cudaSuccess;
        case cudaDevAttrMultiProcessorCount:
            *value = 4;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 << 10;
            return cudaSuccess;
        case cudaDevAttrAsyncEngineCount:
            *value = 2;
            return cudaSuccess;
        default:
            return returned(cudaErrorInvalidValue);
    }
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (device < 0 || device >= emu::devices()) return returned(cudaErrorInvalidDevice);
    std::memset(properties, 0, sizeof *properties);
    std::snprintf(properties->name, sizeof properties->name, "emulated device %d", device);
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t code = emu::last_error;
    emu::last_error = cudaSuccess;
    return code;
}
cudaError_t cudaPeekAtLastError() { return emu::last_error; }
const char* cudaGetErrorName(cudaError_t code) {
#define EMU_NAMED(name) \
    case name:          \
        return #name
    switch (code) {
        EMU_NAMED(cudaSuccess);
        EMU_NAMED(cudaErrorInvalidValue);
        EMU_NAMED(cudaErrorMemoryAllocation);
        EMU_NAMED(cudaErrorInsufficientDriver);
        EMU_NAMED(cudaErrorNoDevice);
        EMU_NAMED(cudaErrorInvalidDevice);
        EMU_NAMED(cudaErrorInvalidResourceHandle);
        EMU_NAMED(cudaErrorIllegalState);
        EMU_NAMED(cudaErrorNotReady);
        EMU_NAMED(cudaErrorIllegalAddress);
        EMU_NAMED(cudaErrorLaunchFailure);
        EMU_NAMED(cudaErrorNoKernelImageForDevice);
        EMU_NAMED(cudaErrorStreamCaptureUnsupported);
        EMU_NAMED(cudaErrorStreamCaptureInvalidated);
        EMU_NAMED(cudaErrorStreamCaptureIsolation);
        EMU_NAMED(cudaErrorCapturedEvent);
        default:
            return "cudaErrorUnknown";
    }
#undef EMU_NAMED
}
const char* cudaGetErrorString(cudaError_t code) { return code == cudaSuccess ? "no error" : "emulated error"; }

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    EMU_ENTER(cudaStreamCreateWithPriority);
    const Quiet quiet;
    auto* const made = new emu::Stream(emu::current_device());
    emu::State& all = emu::state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    all.streams.insert(made);
    *stream = reinterpret_cast<cudaStream_t>(made);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    emu::Stream* const found = stream == nullptr ? nullptr : emu::live_stream(stream);
    if (found == nullptr) return returned(cudaErrorInvalidResourceHandle);
    {
        const Quiet quiet;
        emu::State& all = emu::state();
        const std::lock_guard<std::mutex> guard(all.mutex);
        all.streams.erase(stream);
        all.ended.push_back(found);
    }
    found->stop();
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMU_ENTER(cudaStreamSynchronize);
    emu::Stream* const found = emu::live_stream(stream);
    if (found == nullptr) return returned(cudaErrorInvalidResourceHandle);
    EMU_CHECK(emu::may_wait(found));
    emu::Recording* const recording = emu::new_recording();
    found->push([recording] { recording->finish(); });
    recording->wait();
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    EMU_ENTER(cudaDeviceSynchronize);
    EMU_CHECK(emu::may_wait_for_device(emu::current_device()));
    std::vector<emu::Stream*> mine;
    {
        const Quiet quiet;
        emu::State& all = emu::state();
        const std::lock_guard<std::mutex> guard(all.mutex);
        for (const void* each : all.streams) {
            auto* const stream = static_cast<emu::Stream*>(const_cast<void*>(each));
            if (stream->device == emu::current_device()) mine.push_back(stream);
        }
    }
    for (emu::Stream* const stream : mine) cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream));
    return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    EMU_ENTER(cudaEventCreateWithFlags);
    const Quiet quiet;
    auto* const made = new emu::Event{emu::current_device()};
    emu::State& all = emu::state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    all.events.insert(made);
    *event = reinterpret_cast<cudaEvent_t>(made);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    emu::Event* const found = live_event(event);
    if (found == nullptr) return returned(cudaErrorInvalidResourceHandle);
    const Quiet quiet;
    emu::State& all = emu::state();
    const std::lock_guard<std::mutex> guard(all.mutex);
    all.events.erase(event);
    delete found;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    EMU_ENTER(cudaEventRecord);
    emu::Event* const found = live_event(event);
    emu::Stream* const on = emu::live_stream(stream);
    if (found == nullptr || on == nullptr || found->device != on->device) {
        return returned(cudaErrorInvalidResourceHandle);
    }
    emu::Recording* const recording = emu::new_recording();
    EMU_CHECK(emu::capture_record(on, recording));
    found->recording.store(recording, std::memory_order_relaxed);
    if (recording->inside == nullptr) on->push([recording] { recording->finish(); });
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    EMU_ENTER(cudaStreamWaitEvent);
    emu::Event* const found = live_event(event);
    emu::Stream* const on = emu::live_stream(stream);
    if (found == nullptr || on == nullptr) return returned(cudaErrorInvalidResourceHandle);
    emu::state().waits.fetch_add(1, std::memory_order_relaxed);
    emu::Recording* const recording = found->recording.load(std::memory_order_relaxed);
    EMU_CHECK(emu::capture_wait(on, recording));
    if (recording != nullptr && recording->inside == nullptr) on->push([recording] { recording->wait(); });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMU_ENTER(cudaEventSynchronize);
    emu::Event* const found = live_event(event);
    if (found == nullptr) return returned(cudaErrorInvalidResourceHandle);
    emu::Recording* const recording = found->recording.load(std::memory_order_relaxed);
    EMU_CHECK(emu::may_wait(recording));
    if (recording != nullptr) recording->wait();
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMU_ENTER(cudaEventQuery);
    emu::Event* const found = live_event(event);
    if (found == nullptr) return returned(cudaErrorInvalidResourceHandle);
    emu::Recording* const recording = found->recording.load(std::memory_order_relaxed);
    EMU_CHECK(emu::may_wait(recording));
    return recording == nullptr || recording->done.load(std::memory_order_acquire) != 0 ? cudaSuccess
                                                                                        : cudaErrorNotReady;
}

}  // extern "C"
