// A kernel_cases.hpp problem in device memory, run through csrc/cuda/kernels.hpp. Runtime calls only, so the same tests
// run on the emulation and on a GPU. Outputs and workspace have guards behind them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/runtime.hpp"
#include "tests/check.hpp"
#include "tests/kernel_cases.hpp"

namespace emoe::test {

// One for all tests: on the emulation a stream is a thread, and its fibers are costly to make under ThreadSanitizer.
inline const cuda::Stream& test_stream() {
    static const cuda::Stream stream(0);
    return stream;
}

// On the default device. Copies wait for the stream, so host memory can be used at once.
class DeviceBytes {
  public:
    DeviceBytes(std::size_t bytes, cudaStream_t stream) : stream_(stream), bytes_(bytes) {
        cuda::check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(bytes, 1)), "a test's memory");
    }
    template <class T>
    DeviceBytes(const std::vector<T>& values, cudaStream_t stream) : DeviceBytes(values.size() * sizeof(T), stream) {
        upload(values.data());
    }
    ~DeviceBytes() { cudaFree(data_); }
    DeviceBytes(const DeviceBytes&) = delete;
    DeviceBytes& operator=(const DeviceBytes&) = delete;

    template <class T = std::byte>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    void upload(const void* source) {
        if (bytes_ == 0) return;
        const cuda::PinnedBuffer staging(bytes_, 0);
        std::memcpy(staging.data(), source, bytes_);
        cuda::check(cudaMemcpyAsync(data_, staging.data(), bytes_, cudaMemcpyHostToDevice, stream_), "an upload");
        cuda::check(cudaStreamSynchronize(stream_), "an upload");
    }
    void download(void* target) const {
        if (bytes_ == 0) return;
        const cuda::PinnedBuffer staging(bytes_, 0);
        cuda::check(cudaMemcpyAsync(staging.data(), data_, bytes_, cudaMemcpyDeviceToHost, stream_), "a download");
        cuda::check(cudaStreamSynchronize(stream_), "a download");
        std::memcpy(target, staging.data(), bytes_);
    }

  private:
    cudaStream_t stream_;
    std::size_t bytes_;
    std::byte* data_ = nullptr;
};

constexpr std::size_t kGuard = 64;  // floats

struct DeviceProblem {
    const cuda::Stream& stream = test_stream();
    DeviceBytes slab, slot_of, hidden, index, weights;
    cuda::Mlp op;

    template <class P>  // Problem or EncodedProblem
    explicit DeviceProblem(const P& p)
        : slab(p.slab, stream.get()),
          slot_of(std::vector<std::int32_t>(p.slot_of.size(), -1), stream.get()),
          hidden(p.hidden, stream.get()),
          index(p.index, stream.get()),
          weights(p.weights, stream.get()) {
        op.layout = p.layout;
        op.slab = slab.as();
        op.slot_bytes = p.slot_bytes;
        op.slot_of = slot_of.as<std::int32_t>();
        op.experts = static_cast<std::int64_t>(p.slot_of.size());
        op.hidden = hidden.as();
        op.hidden_dtype = p.c.hidden;
        op.tokens = p.c.T;
        op.index = index.as<std::int64_t>();
        op.weights = weights.as();
        if constexpr (requires { p.c.routing; }) op.weights_dtype = p.c.routing;
        op.top_k = p.c.K;
    }

    // Calls once per table of slots, into one output that starts at zero.
    std::vector<float> run(const std::vector<std::vector<std::int32_t>>& tables) {
        const auto size = static_cast<std::size_t>(op.tokens * op.top_k * op.layout.hidden_out);
        std::vector<float> host(size + kGuard);
        std::fill(host.begin() + static_cast<std::ptrdiff_t>(size), host.end(), 77.0F);
        DeviceBytes out(host, stream.get());
        op.out = out.as<float>();
        const std::size_t bytes = cuda::workspace_bytes(op);
        const std::vector<std::uint8_t> poison(bytes + kGuard, 0xFF);
        DeviceBytes workspace(poison, stream.get());
        for (const std::vector<std::int32_t>& table : tables) {
            cuda::write_table(table, slot_of.as<std::int32_t>(), stream.get());
            cuda::route(op, workspace.as(), stream.get());
            cuda::gather_mlp(op, workspace.as(), stream.get());
        }
        out.download(host.data());
        CHECK(std::all_of(host.end() - kGuard, host.end(), [](float value) { return value == 77.0F; }));
        host.resize(size);
        std::vector<std::uint8_t> after(poison.size());
        workspace.download(after.data());
        CHECK(std::all_of(after.end() - kGuard, after.end(), [](std::uint8_t value) { return value == 0xFF; }));
        return host;
    }
    std::vector<float> run(const std::vector<std::int32_t>& table) {
        return run(std::vector<std::vector<std::int32_t>>{table});
    }
};

template <class P>
std::vector<float> run_on_device(const P& p) {
    return DeviceProblem(p).run(p.slot_of);
}

}  // namespace emoe::test
