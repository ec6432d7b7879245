// Reads with pread, one at a time in each channel.
#pragma once

#include <memory>
#include <string>

#include "io/file_reader.hpp"

namespace emoe::io {

class PreadReader final : public FileReader {
  public:
    using FileReader::FileReader;
    std::string name() const override { return "pread"; }
    std::unique_ptr<ReadChannel> channel() override;
};

}  // namespace emoe::io
