// The CUDA side of emoe._C: one device, its memory and its kernels; bind_cuda_queue.cpp has what fills its slots.
// Streams are integers (cudaStream_t; 0 is the default stream). A build without CUDA has cuda_status() only, which says
// so.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/gather_mlp.hpp"

#ifdef EMOE_HAS_CUDA
#include "bindings/bind_cuda_queue.hpp"
#include "bindings/gather_op.hpp"
#include "core/slab.hpp"
#include "cuda/cuda_backend.hpp"
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
            result["problem"] = "this build has no CUDA part (EMOE_CUDA in CONTRIBUTING.md)";
            return result;
        },
        "What of CUDA is here: `built`, and `problem`, \"\" where a device can be used.");
}

#else

namespace {

using cuda::CudaBackend;

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

void refuse_unknown_slots(const GatherMlp& op, const Slab& slab) {
    for (const std::int32_t slot : op.slot_of) {
        if (slot >= slab.slots()) slab.slot(slot);  // throws, naming the choices
    }
}

// Neighbours that follow each other are one range, so that thousands of slots in ascending order are a few.
std::vector<cuda::Range> ranges_of(const Slab& slab, const py::array& slots) {
    if (slots.size() == 0) return {};
    if (slots.dtype().kind() != 'i' || slots.ndim() != 1) {
        throw Error(ErrorKind::kConfig, "slots must be an array of integers, of one dimension");
    }
    const auto numbers = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>::ensure(slots);
    std::vector<cuda::Range> ranges;
    for (const std::int64_t slot : std::span(numbers.data(), static_cast<std::size_t>(numbers.size()))) {
        const Memory memory = slab.slot(slot);
        const cuda::Range range = cuda::range_of(memory.data, memory.bytes);
        if (!ranges.empty() && ranges.back().end == range.begin) {
            ranges.back().end = range.end;
        } else {
            ranges.push_back(range);
        }
    }
    return ranges;
}

// What the kernels' workspace is a function of.
cuda::Mlp sized_op(const MlpLayout& layout, const Slab& slab, std::int64_t experts, const std::string& hidden_dtype,
                   std::int64_t tokens, const std::string& weights_dtype, std::int64_t top_k) {
    cuda::Mlp op;
    op.layout = layout;
    op.slab = slab.memory().data;
    op.slot_bytes = slab.slot_bytes();
    op.experts = experts;
    op.hidden_dtype = parse_dtype(hidden_dtype);
    op.tokens = tokens;
    op.weights_dtype = parse_dtype(weights_dtype);
    op.top_k = top_k;
    return op;
}

std::size_t workspace_bytes(const MlpLayout& layout, const Slab& slab, std::int64_t experts,
                            const std::string& hidden_dtype, std::int64_t tokens, const std::string& weights_dtype,
                            std::int64_t top_k) {
    cuda::Mlp op = sized_op(layout, slab, experts, hidden_dtype, tokens, weights_dtype, top_k);
    op.hidden = pointer<const void>(1);  // unaligned hidden states take the most
    return cuda::workspace_bytes(op);
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
        .def(py::init(
                 [](int device, std::size_t piece_bytes, std::size_t demand_in_flight, std::size_t prefetch_in_flight) {
                     cuda::CudaOptions options;
                     options.piece_bytes = piece_bytes;
                     options.demand_in_flight = demand_in_flight;
                     options.prefetch_in_flight = prefetch_in_flight;
                     return std::make_shared<CudaBackend>(device, options);
                 }),
             arg("device") = 0, py::kw_only(), arg("piece_bytes") = cuda::CudaOptions{}.piece_bytes,
             arg("demand_in_flight") = cuda::CudaOptions{}.demand_in_flight,
             arg("prefetch_in_flight") = cuda::CudaOptions{}.prefetch_in_flight,
             "Copies go in pieces, of which a lane has so many bytes in flight. BackendUnavailable says which of "
             "driver, device, build is missing; ConfigError names the devices.")
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
            "write_table",
            [](CudaBackend& self, std::uintptr_t table, const py::array_t<std::int32_t, py::array::c_style>& slot_of,
               std::uintptr_t stream) {
                const std::span<const std::int32_t> values(slot_of.data(), static_cast<std::size_t>(slot_of.size()));
                self.write_table({pointer<std::byte>(table), values.size_bytes(), false}, values, stream_of(stream));
            },
            arg("table_ptr"), arg("slot_of"), arg("stream"),
            "A layer's slot table, for what `stream` gets next; makes no copy, so it waits for none.")
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
                const GatherMlp op = gather_op(layout, slab.memory().data, slab.slot_bytes(), slot_of, hidden,
                                               hidden_dtype, tokens, index, weights, weights_dtype, top_k, out);
                refuse_unknown_slots(op, slab);
                const py::gil_scoped_release release;
                self.gather_mlp(op, stream_of(stream));
            },
            arg("layout"), arg("slab"), arg("slot_of"), arg("hidden_ptr"), arg("hidden_dtype"), arg("tokens"),
            arg("index_ptr"), arg("weights_ptr"), arg("weights_dtype"), arg("top_k"), arg("out_ptr"), arg("stream"),
            "emoe._C.gather_mlp in mode \"pairs\" on `stream`; every address but slot_of's is the device's. Returns "
            "when the kernels are enqueued, ordered after the copies into their slots and before later ones.")
        .def(
            "gather_mlp_resident",
            [](CudaBackend& self, const MlpLayout& layout, const Slab& slab, const py::array& slots,
               std::uintptr_t table, std::int64_t experts, std::uintptr_t hidden, const std::string& hidden_dtype,
               std::int64_t tokens, std::uintptr_t index, std::uintptr_t weights, const std::string& weights_dtype,
               std::int64_t top_k, std::uintptr_t out, std::uintptr_t workspace, std::size_t bytes,
               std::uintptr_t stream) {
                cuda::Mlp op = sized_op(layout, slab, experts, hidden_dtype, tokens, weights_dtype, top_k);
                op.slot_of = pointer<const std::int32_t>(table);
                op.hidden = pointer<const void>(hidden);
                op.index = pointer<const std::int64_t>(index);
                op.weights = pointer<const void>(weights);
                op.out = pointer<float>(out);
                const std::vector<cuda::Range> ranges = ranges_of(slab, slots);
                const py::gil_scoped_release release;
                self.gather_mlp_resident(op, ranges, {pointer<std::byte>(workspace), bytes, false}, stream_of(stream));
            },
            arg("layout"), arg("slab"), arg("slots"), arg("table_ptr"), arg("experts"), arg("hidden_ptr"),
            arg("hidden_dtype"), arg("tokens"), arg("index_ptr"), arg("weights_ptr"), arg("weights_dtype"),
            arg("top_k"), arg("out_ptr"), arg("workspace_ptr"), arg("workspace_bytes"), arg("stream"),
            "gather_mlp with the slot table [experts] int32 in device memory and scratch of the caller's. `slots`: "
            "every "
            "slot that the table may name, checked here; what the table holds is not. A stream that captures a graph "
            "only gets the kernels: begin_read and end_read go around each replay.")
        .def_static(
            "workspace_bytes", &workspace_bytes, arg("layout"), arg("slab"), arg("experts"), arg("hidden_dtype"),
            arg("tokens"), arg("weights_dtype"), arg("top_k"),
            "Bytes of scratch that gather_mlp_resident needs, 256-byte aligned; calls that may overlap need one each.")
        .def(
            "capturing",
            [](const CudaBackend& self, std::uintptr_t stream) {
                const cuda::DeviceScope scope(self.device());
                return cuda::capturing(stream_of(stream));
            },
            arg("stream"), "`stream` captures a graph; TransferError where that was invalidated.")
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
            [](CudaBackend& self, const Slab& slab, const py::array& slots, std::uintptr_t stream) {
                self.begin_read(ranges_of(slab, slots), stream_of(stream));
            },
            arg("slab"), arg("slots"), arg("stream"), "What `stream` gets next runs after the copies into these slots.")
        .def(
            "end_read",
            [](CudaBackend& self, const Slab& slab, const py::array& slots, std::uintptr_t stream) {
                self.end_read(ranges_of(slab, slots), stream_of(stream));
            },
            arg("slab"), arg("slots"), arg("stream"),
            "Later copies into these slots run after what `stream` got so far.")
        .def("copy_rate", &CudaBackend::copy_rate, arg("nbytes"), arg("copies") = 8, release_gil(),
             "Bytes a second of pinned host-to-device copies of this size, measured now.")
        .def("finish_copies", &CudaBackend::finish_copies, release_gil());
    bind_cuda_queue(module);
}

#endif

}  // namespace emoe
