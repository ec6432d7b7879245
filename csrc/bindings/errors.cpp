// emoe::Error -> the class of emoe.errors with the same name, with file, tensor, offset and nbytes as attributes.
#include "bindings/errors.hpp"

#include <pybind11/pybind11.h>

#include "core/error.hpp"

namespace py = pybind11;

namespace emoe {
namespace {

const char* class_name(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kConfig:
            return "ConfigError";
        case ErrorKind::kBudget:
            return "BudgetError";
        case ErrorKind::kCheckpoint:
            return "CheckpointError";
        case ErrorKind::kRead:
            return "ReadError";
        case ErrorKind::kTransfer:
            return "TransferError";
        case ErrorKind::kQueueFull:
            return "QueueFullError";
        case ErrorKind::kCancelled:
            return "CancelledError";
        case ErrorKind::kClosed:
            return "ClosedError";
        case ErrorKind::kBackendUnavailable:
            return "BackendUnavailable";
    }
    return "EmoeError";
}

void set_python_error(const Error& error) {
    const py::object type = py::module_::import("emoe.errors").attr(class_name(error.kind));
    const bool about_a_file = error.kind == ErrorKind::kCheckpoint || error.kind == ErrorKind::kRead;
    const py::object value = about_a_file
                                 ? type(error.message, py::arg("file") = error.file, py::arg("tensor") = error.tensor,
                                        py::arg("offset") = error.offset, py::arg("nbytes") = error.nbytes)
                                 : type(error.message);
    PyErr_SetObject(type.ptr(), value.ptr());
}

}  // namespace

void register_errors() {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const Error& error) {
            try {
                set_python_error(error);
            } catch (py::error_already_set& python) {
                python.restore();  // emoe.errors itself could not be imported
            }
        }
    });
}

}  // namespace emoe
