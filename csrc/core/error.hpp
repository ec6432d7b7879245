// The one exception native code throws on purpose. csrc/bindings/errors.cpp turns each kind into the class of
// emoe.errors with the same name; file, tensor, offset and nbytes become attributes where they are set.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace emoe {

enum class ErrorKind : std::uint8_t {
    kConfig,              // ConfigError
    kBudget,              // BudgetError
    kCheckpoint,          // CheckpointError
    kRead,                // ReadError
    kTransfer,            // TransferError
    kQueueFull,           // QueueFullError
    kCancelled,           // CancelledError
    kClosed,              // ClosedError
    kBackendUnavailable,  // BackendUnavailable
};

struct Error : std::exception {
    Error(ErrorKind kind_, std::string message_) : kind(kind_), message(std::move(message_)) {}
    Error(ErrorKind kind_, std::string message_, std::string file_, std::string tensor_, std::int64_t offset_,
          std::int64_t nbytes_)
        : kind(kind_),
          message(std::move(message_)),
          file(std::move(file_)),
          tensor(std::move(tensor_)),
          offset(offset_),
          nbytes(nbytes_) {}

    const char* what() const noexcept override { return message.c_str(); }

    ErrorKind kind;
    std::string message;
    std::string file;          // path, or ""
    std::string tensor;        // name, or ""
    std::int64_t offset = -1;  // first byte of the range that failed, or -1
    std::int64_t nbytes = -1;  // its length, or -1
};

}  // namespace emoe
