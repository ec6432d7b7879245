// Reads through io_uring, several in flight in each channel. Raw system calls; liburing is not needed.
#pragma once

#include <memory>
#include <string>

#include "io/file_reader.hpp"

namespace emoe::io {

// Why io_uring cannot be used here, or "".
std::string uring_refusal();

class UringReader final : public FileReader {
  public:
    using FileReader::FileReader;
    std::string name() const override { return "uring"; }
    std::unique_ptr<ReadChannel> channel() override;  // BackendUnavailable
};

}  // namespace emoe::io
