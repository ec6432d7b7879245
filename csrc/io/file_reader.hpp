// Opening files for reading, with O_DIRECT where the file system allows it. The base of the readers in this folder.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "core/fork.hpp"
#include "core/reader.hpp"

namespace emoe::io {

class FileReader : public Reader {
  public:
    FileReader(bool direct, std::string note) : direct_(direct), note_(std::move(note)) {}
    bool direct() const noexcept override { return direct_.load(std::memory_order_relaxed); }
    std::string note() const override;
    std::unique_ptr<File> open(std::shared_ptr<const SourceFile> source) override;

  private:
    std::atomic<bool> direct_;
    mutable ForkMutex mutex_{ForkMutex::Level::kReader};  // guards note_
    std::string note_;
};

}  // namespace emoe::io
