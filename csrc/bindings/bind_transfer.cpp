// The transfer side of emoe._C: slabs, records, readers and the queue between them.
#include "bindings/transfer_stats.hpp"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/record.hpp"
#include "core/slab.hpp"
#include "core/transfer.hpp"
#include "cpu/cpu_backend.hpp"
#include "io/faulty_reader.hpp"
#include "io/make_reader.hpp"

namespace py = pybind11;

namespace emoe {
namespace {

// (file_id, offset, nbytes, tensor, src_dtype, dst_offset_bytes, dst_dtype, rows, cols, dst_row_stride, dst_col_stride)
using PieceTuple = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::string, std::string, std::int64_t,
                              std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

// device, inode, size, mtime_ns, as os.fstat has them
using IdentityTuple = std::tuple<std::uint64_t, std::uint64_t, std::int64_t, std::int64_t>;

std::int64_t add_file(RecordTable& table, const std::string& path, std::optional<int> fd,
                      const std::optional<IdentityTuple>& identity) {
    if (!identity) return table.add_file(path, fd);
    const auto& [device, inode, size, mtime_ns] = *identity;
    return table.add_file(path, fd, FileIdentity{device, inode, size, mtime_ns});
}

std::int64_t add_record(RecordTable& table, const std::vector<PieceTuple>& tuples) {
    std::vector<Piece> pieces;
    pieces.reserve(tuples.size());
    for (const auto& [file, offset, nbytes, tensor, src, dst_offset, dst, rows, cols, row_stride, col_stride] :
         tuples) {
        pieces.push_back({file, offset, nbytes, tensor, dst_offset,
                          ScatterLayout{parse_dtype(src), parse_dtype(dst), rows, cols, row_stride, col_stride}});
    }
    return table.add_record(std::move(pieces));
}

std::shared_ptr<Reader> make_reader(const std::string& kind, bool direct) {
    std::shared_ptr<Reader> reader = io::make_reader(kind, direct);
    if (const std::string note = reader->note(); !note.empty()) {
        py::module_::import("logging").attr("getLogger")("emoe").attr("warning")("emoe: %s", note);
    }
    return reader;
}

}  // namespace

py::dict to_dict(const TransferStats& stats) {
    py::dict result;
    result["demand_bytes"] = stats.bytes[0];
    result["prefetch_bytes"] = stats.bytes[1];
    result["demand_jobs"] = stats.jobs[0];
    result["prefetch_jobs"] = stats.jobs[1];
    result["cancelled"] = stats.cancelled;
    result["failed"] = stats.failed;
    result["read_seconds"] = stats.read_seconds;
    result["wait_seconds"] = stats.wait_seconds;
    result["reader"] = stats.reader;
    result["queued"] = stats.queued;
    return result;
}

void bind_transfer(py::module_& module) {
    using py::arg;
    using release_gil = py::call_guard<py::gil_scoped_release>;

    py::class_<Slab, std::shared_ptr<Slab>>(module, "Slab", "One allocation cut into equal slots.")
        .def(py::init([](std::int64_t slots, std::int64_t slot_bytes) {
                 return std::make_shared<Slab>(std::make_shared<cpu::CpuBackend>(), slots, slot_bytes);
             }),
             arg("slots"), arg("slot_bytes"))
        .def_property_readonly("address",
                               [](const Slab& slab) { return reinterpret_cast<std::uintptr_t>(slab.memory().data); })
        .def_property_readonly("slots", &Slab::slots)
        .def_property_readonly("slot_bytes", &Slab::slot_bytes, "Bytes of one slot, a multiple of 4096.");

    py::class_<RecordTable, std::shared_ptr<RecordTable>>(module, "RecordTable", "Where experts lie in files.")
        .def(py::init<>())
        .def("add_file", &add_file, arg("path"), arg("fd") = py::none(), arg("identity") = py::none(),
             "Returns the id of the file, which stays open. `fd`: duplicated in place of opening the path; `identity`: "
             "(device, inode, size, mtime_ns) that it has to have. ReadError.")
        .def("add_record", &add_record, arg("pieces"), "Returns the id of the record. ConfigError.")
        .def(
            "record_bytes", [](const RecordTable& table, std::int64_t id) { return table.record(id)->bytes; },
            arg("record_id"), "Bytes to be read from files.");

    py::class_<Reader, std::shared_ptr<Reader>>(module, "Reader", "Reads bytes from files; see make_reader.")
        .def_property_readonly("name", &Reader::name)
        .def_property_readonly("direct", &Reader::direct, "False once a file system has refused O_DIRECT.")
        .def_property_readonly("note", &Reader::note, "Why it is not what was preferred, or \"\".");
    module.def(
        "make_reader", &make_reader, arg("kind") = "auto", arg("direct") = true,
        "A reader: \"auto\", \"uring\" or \"pread\". Logs where auto falls back. ConfigError; BackendUnavailable.");
    module.def(
        "FaultyReader",
        [](std::shared_ptr<Reader> reader, std::int64_t fail_at, int error_number, std::int64_t short_at,
           int delay_ms) {
            return io::make_faulty_reader(std::move(reader), {fail_at, error_number, short_at, delay_ms});
        },
        arg("reader"), py::kw_only(), arg("fail_at") = -1, arg("errno") = 5, arg("short_at") = -1, arg("delay_ms") = 0,
        "For tests: read number `fail_at` (from 0, over all workers) fails, number `short_at` gives half its bytes.");

    py::class_<TransferQueue, std::shared_ptr<TransferQueue>>(module, "TransferQueue",
                                                              "Fills slots with records in the background.")
        .def(py::init([](std::shared_ptr<Slab> slab, std::shared_ptr<RecordTable> table, std::shared_ptr<Reader> reader,
                         int workers, std::int64_t prefetch_bytes) {
                 return std::make_shared<TransferQueue>(std::move(slab), std::move(table), std::move(reader), workers,
                                                        prefetch_bytes);
             }),
             arg("slab"), arg("table"), arg("reader"), py::kw_only(), arg("workers") = 2,
             arg("prefetch_bytes") = std::int64_t{64} << 20)
        .def(
            "submit",
            [](TransferQueue& queue, std::int64_t record, std::int64_t slot, bool prefetch) {
                return queue.submit(record, slot, prefetch ? Lane::kPrefetch : Lane::kDemand).id;
            },
            arg("record"), arg("slot"), arg("prefetch") = false, "Returns a ticket; never blocks.")
        .def(
            "promote", [](TransferQueue& queue, std::uint64_t ticket) { queue.promote({ticket}); }, arg("ticket"),
            "A queued prefetch becomes a demand.")
        .def(
            "cancel", [](TransferQueue& queue, std::uint64_t ticket) { return queue.cancel({ticket}); }, arg("ticket"),
            "True: it never ran and its slot was not touched.")
        .def(
            "ticket_of", [](TransferQueue& queue, std::int64_t slot) { return to_number(queue.ticket_of(slot)); },
            arg("slot"), "The newest ticket submitted for the slot and not waited for; None: nothing will write to it.")
        .def(
            "done", [](TransferQueue& queue, std::uint64_t ticket) { return queue.done({ticket}); }, arg("ticket"),
            "True when over in any way; never blocks.")
        .def(
            "wait", [](TransferQueue& queue, std::uint64_t ticket) { queue.wait({ticket}); }, arg("ticket"),
            release_gil(), "Returns when the slot holds the record. ReadError, CancelledError, TransferError.")
        .def("stats", [](TransferQueue& queue) { return to_dict(queue.stats()); })
        .def("close", &TransferQueue::close, release_gil(), "Finishes running jobs, cancels the rest; idempotent.");
}

}  // namespace emoe
