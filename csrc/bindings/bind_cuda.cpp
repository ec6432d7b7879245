// The CUDA side of emoe._C: one device, its slots, the pinned store and the queue between them. Streams are integers
// (cudaStream_t; 0 is the default stream). A build without CUDA has cuda_status() only, which says so.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/gather_mlp.hpp"

#ifdef EMOE_HAS_CUDA
#include "core/slab.hpp"
#include "cuda/cuda_backend.hpp"
#include "cuda/device_queue.hpp"
#include "cuda/host_store.hpp"
#include "cuda/kernels.hpp"
#endif

namespace py = pybind11;

namespace emoe {

#ifndef EMOE_HAS_CUDA

void bind_cuda(py::module_& module) {
    module.def(
        "cuda_status",
        [] {
            py::dict result;
            result["built"] = false;
            result["problem"] = "this build has no CUDA part (EMOE_CUDA in docs/building.md)";
            return result;
        },
        "What of CUDA is here: `built`, and `problem`, \"\" where a device can be used.");
}

#else

namespace {

using cuda::CudaBackend;
using cuda::DeviceQueue;
using cuda::HostStore;

cudaStream_t stream_of(std::uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

py::dict cuda_status() {
    const cuda::Status status = cuda::look_around();
    py::list devices;
    for (const cuda::DeviceInfo& info : status.devices) {
        py::dict device;
        device["index"] = info.index;
        device["name"] = info.name;
        device["capability"] = py::make_tuple(info.major, info.minor);
        device["total_bytes"] = info.total_bytes;
        devices.append(device);
    }
    py::dict result;
    result["built"] = true;
    result["architectures"] = EMOE_CUDA_ARCHS;
    result["runtime"] = status.runtime;
    result["driver"] = status.driver;
    result["devices"] = devices;
    result["problem"] = status.problem;
    return result;
}

GatherMlp make_op(const MlpLayout& layout, const Slab& slab, const py::array& slot_of, std::uintptr_t hidden_ptr,
                  const std::string& hidden_dtype, std::int64_t tokens, std::uintptr_t index_ptr,
                  std::uintptr_t weights_ptr, const std::string& weights_dtype, std::int64_t top_k,
                  std::uintptr_t out_ptr) {
    if (!py::isinstance<py::array_t<std::int32_t, py::array::c_style> >(slot_of) || slot_of.ndim() != 1) {
        throw Error(ErrorKind::kConfig, "slot_of must be a contiguous int32 numpy array of one dimension");
    }
    GatherMlp op;
    op.layout = layout;
    op.slab = slab.memory().data;
    op.slot_bytes = slab.slot_bytes();
    op.slot_of = {static_cast<const std::int32_t*>(slot_of.data()), static_cast<std::size_t>(slot_of.size())};
    for (const std::int32_t slot : op.slot_of) {
        if (slot >= slab.slots()) slab.slot(slot);  // throws, naming the choices
    }
    op.hidden = pointer<const void>(hidden_ptr);
    op.hidden_dtype = parse_dtype(hidden_dtype);
    op.tokens = tokens;
    op.index = pointer<const std::int64_t>(index_ptr);
    op.weights = pointer<const void>(weights_ptr);
    op.weights_dtype = parse_dtype(weights_dtype);
    op.top_k = top_k;
    op.out = pointer<float>(out_ptr);
    return op;
}

std::vector<cuda::Range> ranges_of(const Slab& slab, const std::vector<std::int64_t>& slots) {
    std::vector<cuda::Range> ranges;
    for (const std::int64_t slot : slots) {
        const Memory memory = slab.slot(slot);
        ranges.push_back(cuda::range_of(memory.data, memory.bytes));
    }
    return ranges;
}

py::dict stats(const DeviceQueue& queue) {
    const cuda::DeviceQueueStats s = queue.stats();
    py::dict result;
    result["demand_bytes"] = s.transfer.bytes[0];
    result["prefetch_bytes"] = s.transfer.bytes[1];
    result["demand_jobs"] = s.transfer.jobs[0];
    result["prefetch_jobs"] = s.transfer.jobs[1];
    result["cancelled"] = s.transfer.cancelled;
    result["failed"] = s.transfer.failed;
    result["read_seconds"] = s.transfer.read_seconds;
    result["wait_seconds"] = s.transfer.wait_seconds;
    result["reader"] = s.transfer.reader;
    result["queued"] = s.transfer.queued;
    result["file_bytes"] = s.file_bytes;
    result["host_hits"] = s.host_hits;
    result["host_misses"] = s.host_misses;
    return result;
}

}  // namespace

void bind_cuda(py::module_& module) {
    using py::arg;
    using release_gil = py::call_guard<py::gil_scoped_release>;
    const auto address = [](const std::byte* data) { return reinterpret_cast<std::uintptr_t>(data); };

    module.def("cuda_status", &cuda_status,
               "What of CUDA is here: built, architectures, runtime and driver (12080 for 12.8, 0: none), devices, and "
               "`problem`, \"\" where a device can be used.");
    module.def("cuda_refusal", &cuda::refusal, arg("layout"),
               "\"\" where the GPU kernels take the layout, or why not.");

    py::class_<CudaBackend, std::shared_ptr<CudaBackend> >(module, "CudaDevice", "One GPU: memory, copies, kernels.")
        .def(py::init([](int device, int demand_in_flight, int prefetch_in_flight) {
                 cuda::CudaOptions options;
                 options.demand_in_flight = demand_in_flight;
                 options.prefetch_in_flight = prefetch_in_flight;
                 return std::make_shared<CudaBackend>(device, options);
             }),
             arg("device") = 0, py::kw_only(), arg("demand_in_flight") = 4, arg("prefetch_in_flight") = 2,
             "BackendUnavailable says which of driver, device, build is missing; ConfigError names the devices.")
        .def_property_readonly("index", &CudaBackend::device)
        .def(
            "slab",
            [](std::shared_ptr<CudaBackend> self, std::int64_t slots, std::int64_t slot_bytes) {
                return std::make_shared<Slab>(std::move(self), slots, slot_bytes);
            },
            arg("slots"), arg("slot_bytes"), "Slots in this device's memory. BudgetError names what is free.")
        .def(
            "allocate", [address](CudaBackend& self, std::size_t bytes) { return address(self.allocate(bytes).data); },
            arg("nbytes"), release_gil(), "Address of cleared device memory.")
        .def(
            "free", [](CudaBackend& self, std::uintptr_t memory) { self.free({pointer<std::byte>(memory), 0, false}); },
            arg("address"), release_gil(), "Waits for what still uses it.")
        .def(
            "upload",
            [](CudaBackend& self, std::uintptr_t dst, std::uintptr_t src, std::size_t bytes, std::uintptr_t stream) {
                self.upload({pointer<std::byte>(dst), bytes, false}, {pointer<const std::byte>(src), bytes},
                            stream_of(stream));
            },
            arg("dst"), arg("src"), arg("nbytes"), arg("stream"), release_gil(),
            "Host to device, through staging; `src` may change when it returns.")
        .def(
            "download",
            [](CudaBackend& self, std::uintptr_t dst, std::uintptr_t src, std::size_t bytes, std::uintptr_t stream) {
                self.download({pointer<std::byte>(dst), bytes}, pointer<const std::byte>(src), stream_of(stream));
            },
            arg("dst"), arg("src"), arg("nbytes"), arg("stream"), release_gil(), "Device to host; blocks.")
        .def(
            "copy",
            [](CudaBackend& self, std::uintptr_t dst, std::uintptr_t src, std::size_t bytes, bool prefetch) {
                self.copy({pointer<std::byte>(dst), bytes, false}, {pointer<const std::byte>(src), bytes},
                          prefetch ? Lane::kPrefetch : Lane::kDemand);
            },
            arg("dst"), arg("src"), arg("nbytes"), arg("prefetch") = false, release_gil(),
            "Pinned memory to device, on a lane's stream; blocks while the lane is full. finish_copies() waits for it.")
        .def(
            "gather_mlp",
            [](CudaBackend& self, const MlpLayout& layout, const Slab& slab, const py::array& slot_of,
               std::uintptr_t hidden, const std::string& hidden_dtype, std::int64_t tokens, std::uintptr_t index,
               std::uintptr_t weights, const std::string& weights_dtype, std::int64_t top_k, std::uintptr_t out,
               std::uintptr_t stream) {
                const GatherMlp op = make_op(layout, slab, slot_of, hidden, hidden_dtype, tokens, index, weights,
                                             weights_dtype, top_k, out);
                const py::gil_scoped_release release;
                self.gather_mlp(op, stream_of(stream));
            },
            arg("layout"), arg("slab"), arg("slot_of"), arg("hidden_ptr"), arg("hidden_dtype"), arg("tokens"),
            arg("index_ptr"), arg("weights_ptr"), arg("weights_dtype"), arg("top_k"), arg("out_ptr"), arg("stream"),
            "emoe._C.gather_mlp in mode \"pairs\" on `stream`; every address but slot_of's is the device's. Returns "
            "when the kernels are enqueued, ordered after the copies into their slots and before later ones.")
        .def(
            "combine",
            [](CudaBackend& self, std::uintptr_t pairs, std::int64_t tokens, std::int64_t top_k,
               std::int64_t hidden_out, std::uintptr_t out, const std::string& out_dtype, std::uintptr_t stream) {
                const DType dtype = parse_dtype(out_dtype);
                const py::gil_scoped_release release;
                const cuda::DeviceScope scope(self.device());
                cuda::combine(pointer<const float>(pairs), tokens, top_k, hidden_out, pointer<void>(out), dtype, false,
                              stream_of(stream));
            },
            arg("pairs_ptr"), arg("tokens"), arg("top_k"), arg("hidden_out"), arg("out_ptr"), arg("out_dtype"),
            arg("stream"))
        .def(
            "begin_read",
            [](CudaBackend& self, const Slab& slab, const std::vector<std::int64_t>& slots, std::uintptr_t stream) {
                self.begin_read(ranges_of(slab, slots), stream_of(stream));
            },
            arg("slab"), arg("slots"), arg("stream"), "What `stream` gets next runs after the copies into these slots.")
        .def(
            "end_read",
            [](CudaBackend& self, const Slab& slab, const std::vector<std::int64_t>& slots, std::uintptr_t stream) {
                self.end_read(ranges_of(slab, slots), stream_of(stream));
            },
            arg("slab"), arg("slots"), arg("stream"),
            "Later copies into these slots run after what `stream` got so far.")
        .def("copy_rate", &CudaBackend::copy_rate, arg("nbytes"), arg("copies") = 8, release_gil(),
             "Bytes a second of pinned host-to-device copies of this size, measured now.")
        .def("finish_copies", &CudaBackend::finish_copies, release_gil());

    py::class_<HostStore, std::shared_ptr<HostStore> >(module, "HostStore", "Records in slots of pinned host memory.")
        .def(py::init<std::int64_t, std::int64_t, int>(), arg("slots"), arg("slot_bytes"), arg("device") = 0)
        .def_property_readonly("address", [address](const HostStore& store) { return address(store.data()); })
        .def_property_readonly("slots", &HostStore::slots)
        .def_property_readonly("slot_bytes", &HostStore::slot_bytes)
        .def_property_readonly("used", &HostStore::used, "Slots that somebody uses now.")
        .def("holds", &HostStore::holds, arg("record"));

    py::class_<DeviceQueue, std::shared_ptr<DeviceQueue> >(module, "DeviceQueue",
                                                           "Fills slots of a device: file, pinned memory, device.")
        .def(py::init([](std::shared_ptr<CudaBackend> device, std::shared_ptr<Slab> slab,
                         std::shared_ptr<RecordTable> table, std::shared_ptr<Reader> reader,
                         std::shared_ptr<HostStore> store, int workers, std::int64_t prefetch_bytes) {
                 return std::make_shared<DeviceQueue>(std::move(device), std::move(slab), std::move(table),
                                                      std::move(reader), std::move(store), workers, prefetch_bytes);
             }),
             arg("device"), arg("slab"), arg("table"), arg("reader"), arg("store"), py::kw_only(), arg("workers") = 2,
             arg("prefetch_bytes") = std::int64_t{64} << 20)
        .def(
            "submit",
            [](DeviceQueue& queue, std::int64_t record, std::int64_t slot, bool prefetch) {
                return queue.submit(record, slot, prefetch ? Lane::kPrefetch : Lane::kDemand).id;
            },
            arg("record"), arg("slot"), arg("prefetch") = false)
        .def(
            "submit_host",
            [](DeviceQueue& queue, std::int64_t record, bool prefetch) {
                return queue.submit_host(record, prefetch ? Lane::kPrefetch : Lane::kDemand).id;
            },
            arg("record"), arg("prefetch") = false, "Only into pinned memory; wait() gives the host slot.")
        .def(
            "promote", [](DeviceQueue& queue, std::uint64_t ticket) { queue.promote({ticket}); }, arg("ticket"))
        .def(
            "cancel", [](DeviceQueue& queue, std::uint64_t ticket) { return queue.cancel({ticket}); }, arg("ticket"))
        .def(
            "done", [](const DeviceQueue& queue, std::uint64_t ticket) { return queue.done({ticket}); }, arg("ticket"))
        .def(
            "issued", [](const DeviceQueue& queue, std::uint64_t ticket) { return queue.issued({ticket}); },
            arg("ticket"), "order_after() would not block.")
        .def(
            "wait", [](DeviceQueue& queue, std::uint64_t ticket) { return queue.wait({ticket}); }, arg("ticket"),
            release_gil(), "Blocks until the bytes are there; the host slot of submit_host(), or -1.")
        .def(
            "order_after",
            [](DeviceQueue& queue, std::uint64_t ticket, std::uintptr_t stream) {
                queue.order_after({ticket}, stream_of(stream));
            },
            arg("ticket"), arg("stream"), release_gil(),
            "Blocks until the copy is in its stream; what `stream` gets next runs after it.")
        .def("release_host", &DeviceQueue::release_host, arg("host_slot"))
        .def("stats", &stats)
        .def("close", &DeviceQueue::close, release_gil());
}

#endif

}  // namespace emoe
