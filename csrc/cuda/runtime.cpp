#include "cuda/runtime.hpp"

#include <atomic>
#include <utility>

#include "core/error.hpp"
#include "core/fork.hpp"

namespace emoe::cuda {
namespace {

// Set by whatever uses a device first in this family of processes; ~0: nothing yet.
std::atomic<std::uint64_t> used_in{~std::uint64_t{0}};

constexpr int kOldestMajor = 8;  // the kernels use bf16 mma and cp.async

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string problem_of(cudaError_t code, const Status& status) {
    if (code == cudaErrorInsufficientDriver) {
        if (status.driver == 0) return "no CUDA driver is installed on this machine";
        return "the CUDA driver supports CUDA " + version(status.driver) + ", this build needs " +
               version(status.runtime) + ": install a newer driver, or the wheel for CUDA " +
               std::to_string(status.driver / 1000);
    }
    if (code == cudaErrorNoDevice) {
        if (status.driver == 0) return "no CUDA driver is installed on this machine";
        return "a CUDA driver (" + version(status.driver) + ") is here, but no CUDA device";
    }
    return std::string("the CUDA runtime does not start: ") + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) +
           ")";
}

}  // namespace

void raise(cudaError_t code, const std::string& what) {
    cudaGetLastError();  // the error is reported here; a later kernel launch must not report it again
    ErrorKind kind = ErrorKind::kTransfer;
    if (code == cudaErrorMemoryAllocation) kind = ErrorKind::kBudget;
    if (code == cudaErrorInsufficientDriver || code == cudaErrorNoDevice || code == cudaErrorNoKernelImageForDevice) {
        kind = ErrorKind::kBackendUnavailable;
    }
    throw Error(kind, std::string(cudaGetErrorName(code)) + " (" + cudaGetErrorString(code) + ") while " + what);
}

Status look_around() {
    Status status;
    cudaDriverGetVersion(&status.driver);
    cudaRuntimeGetVersion(&status.runtime);
    int count = 0;
    const cudaError_t code = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (code != cudaSuccess) {
        status.problem = problem_of(code, status);
        return status;
    }
    std::string too_old;
    for (int index = 0; index < count; ++index) {
        DeviceInfo info;
        info.index = index;
        cudaDeviceProp properties{};
        if (cudaGetDeviceProperties(&properties, index) == cudaSuccess) info.name = properties.name;
        cudaDeviceGetAttribute(&info.major, cudaDevAttrComputeCapabilityMajor, index);
        cudaDeviceGetAttribute(&info.minor, cudaDevAttrComputeCapabilityMinor, index);
        info.total_bytes = properties.totalGlobalMem;  // what is free takes a context, which looking must not make
        if (info.major < kOldestMajor) {
            too_old = info.name + " has compute capability " + std::to_string(info.major) + "." +
                      std::to_string(info.minor) + ", the kernels need 8.0";
        }
        status.devices.push_back(std::move(info));
    }
    cudaGetLastError();
    if (count == 0) {
        status.problem = problem_of(cudaErrorNoDevice, status);
    } else if (!too_old.empty() && count == 1) {
        status.problem = too_old;
    }
    return status;
}

void require_device(int device) {
    const Status status = look_around();
    if (!status.problem.empty()) throw Error(ErrorKind::kBackendUnavailable, status.problem);
    const int count = static_cast<int>(status.devices.size());
    if (device < 0 || device >= count) {
        throw Error(ErrorKind::kConfig, "CUDA device " + std::to_string(device) + " is none of the " +
                                            std::to_string(count) + " devices: 0.." + std::to_string(count - 1));
    }
    const DeviceInfo& info = status.devices[static_cast<std::size_t>(device)];
    if (info.major < kOldestMajor) {
        throw Error(ErrorKind::kBackendUnavailable, "device " + std::to_string(device) + " (" + info.name +
                                                        ") has compute capability " + std::to_string(info.major) + "." +
                                                        std::to_string(info.minor) + ", the kernels need 8.0");
    }
}

bool device_lost() noexcept {
    std::uint64_t unused = ~std::uint64_t{0};
    return !used_in.compare_exchange_strong(unused, fork_generation()) && unused != fork_generation();
}

void refuse_lost_device() {
    if (!device_lost()) return;
    throw Error(
        ErrorKind::kBackendUnavailable,
        "this process was forked from one that used a CUDA device, and CUDA does not survive that: load the model "
        "in the child, or start it with 'spawn'");
}

DeviceScope::DeviceScope(int device) {
    refuse_lost_device();
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "making device ", device, " current");
    changed_ = true;
}

DeviceScope::~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
}

bool capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t code = cudaStreamIsCapturing(stream, &status);
    if (code == cudaErrorStreamCaptureImplicit) {  // the default stream, while a blocking one captures: not this one
        cudaGetLastError();
        return false;
    }
    check(code, "asking whether a stream captures a graph");
    if (status == cudaStreamCaptureStatusInvalidated) {
        throw Error(ErrorKind::kTransfer,
                    "the stream captures a graph that an earlier error has invalidated; the capture has to be ended");
    }
    return status == cudaStreamCaptureStatusActive;
}

void refuse_capture(cudaStream_t stream, const char* why) {
    if (capturing(stream)) throw Error(ErrorKind::kTransfer, std::string("the stream captures a graph; ") + why);
}

bool Event::done() const {
    if (!handle_) return true;
    const cudaError_t code = cudaEventQuery(handle_.get());
    if (code == cudaErrorNotReady) return false;
    check(code, "asking whether an event is over");
    return true;
}

void Event::synchronize() const {
    if (handle_) check(cudaEventSynchronize(handle_.get()), "waiting for an event");
}

void Event::before(cudaStream_t stream) const {
    if (handle_) check(cudaStreamWaitEvent(stream, handle_.get(), 0), "ordering a stream after an event");
}

std::shared_ptr<EventPool> EventPool::make(int device) { return std::shared_ptr<EventPool>(new EventPool(device)); }

EventPool::~EventPool() {
    if (device_lost()) return;
    for (const cudaEvent_t event : idle_) cudaEventDestroy(event);
}

Event EventPool::record(cudaStream_t stream) {
    cudaEvent_t handle = nullptr;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!idle_.empty()) {
            handle = idle_.back();
            idle_.pop_back();
        }
    }
    const DeviceScope scope(device_);
    if (handle == nullptr) {
        check(cudaEventCreateWithFlags(&handle, cudaEventDisableTiming | cudaEventBlockingSync),
              "creating an event on device ", device_);
    }
    Event event;
    event.handle_ = std::shared_ptr<CUevent_st>(handle, [pool = shared_from_this()](cudaEvent_t idle) {
        const std::lock_guard<std::mutex> lock(pool->mutex_);
        pool->idle_.push_back(idle);
    });
    check(cudaEventRecord(handle, stream), "recording an event on device ", device_);
    return event;
}

Stream::Stream(int device) : device_(device) {
    const DeviceScope scope(device);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a copy stream on device ", device);
}

Stream::~Stream() {
    if (!device_lost()) cudaStreamDestroy(stream_);
}

void Stream::synchronize() const {
    check(cudaStreamSynchronize(stream_), "waiting for a copy stream of device ", device_);
}

PinnedBuffer::PinnedBuffer(std::size_t bytes, int device) : bytes_(bytes) {
    const DeviceScope scope(device);
    void* data = nullptr;
    check(cudaHostAlloc(&data, bytes, cudaHostAllocPortable), "pinning ", bytes, " bytes of host memory");
    data_ = static_cast<std::byte*>(data);
}

PinnedBuffer::~PinnedBuffer() {
    if (!device_lost()) cudaFreeHost(data_);
}

}  // namespace emoe::cuda
