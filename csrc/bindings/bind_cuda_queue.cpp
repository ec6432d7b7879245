// The pinned store and the queue that fills a device's slots; nothing in a build without CUDA.
#ifdef EMOE_HAS_CUDA
#include "bindings/bind_cuda_queue.hpp"

#include <memory>

#include "bindings/transfer_stats.hpp"
#include "core/slab.hpp"
#include "cuda/cuda_backend.hpp"
#include "cuda/device_queue.hpp"
#include "cuda/pinned_cache.hpp"

namespace py = pybind11;

namespace emoe {
namespace {

using cuda::CudaBackend;
using cuda::DeviceQueue;
using cuda::PinnedCache;

py::dict stats(DeviceQueue& queue) {
    const cuda::DeviceQueueStats s = queue.stats();
    py::dict result = to_dict(s.transfer);
    result["file_bytes"] = s.file_bytes;
    result["host_hits"] = s.host_hits;
    result["host_misses"] = s.host_misses;
    return result;
}

}  // namespace

void bind_cuda_queue(py::module_& module) {
    using py::arg;
    using release_gil = py::call_guard<py::gil_scoped_release>;

    py::class_<PinnedCache, std::shared_ptr<PinnedCache> >(module, "PinnedCache",
                                                           "Records in slots of pinned host memory.")
        .def(py::init<std::int64_t, std::int64_t, int>(), arg("slots"), arg("slot_bytes"), arg("device") = 0,
             release_gil())
        .def_property_readonly("address",
                               [](const PinnedCache& store) { return reinterpret_cast<std::uintptr_t>(store.data()); })
        .def_property_readonly("slots", &PinnedCache::slots)
        .def_property_readonly("slot_bytes", &PinnedCache::slot_bytes)
        .def_property_readonly("used", &PinnedCache::used, "Slots that somebody uses now.")
        .def("holds", &PinnedCache::holds, arg("record"));

    py::class_<DeviceQueue, std::shared_ptr<DeviceQueue> >(module, "DeviceQueue",
                                                           "Fills slots of a device: file, pinned memory, device.")
        .def(py::init([](std::shared_ptr<CudaBackend> device, std::shared_ptr<Slab> slab,
                         std::shared_ptr<RecordTable> table, std::shared_ptr<Reader> reader,
                         std::shared_ptr<PinnedCache> store, int workers, std::int64_t prefetch_bytes) {
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
            "ticket_of", [](DeviceQueue& queue, std::int64_t slot) { return to_number(queue.ticket_of(slot)); },
            arg("slot"), "The newest ticket submitted for the slot and not waited for; None: nothing will write to it.")
        .def(
            "done", [](DeviceQueue& queue, std::uint64_t ticket) { return queue.done({ticket}); }, arg("ticket"))
        .def(
            "issued", [](DeviceQueue& queue, std::uint64_t ticket) { return queue.issued({ticket}); }, arg("ticket"),
            "order_after() would not block.")
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
        .def("release_host", &DeviceQueue::release_host, arg("host_slot"), "TransferError where it is not held.")
        .def("reclaim_host", &DeviceQueue::reclaim_host, release_gil(),
             "Ends every submit_host() and releases every host slot that wait() gave out.")
        .def("stats", &stats)
        .def("close", &DeviceQueue::close, release_gil());
}

}  // namespace emoe

#endif
