#include "io/pread_reader.hpp"

#include <unistd.h>

#include <cerrno>
#include <optional>

namespace emoe::io {
namespace {

class PreadChannel final : public ReadChannel {
  public:
    std::size_t depth() const noexcept override { return 1; }
    std::size_t chunk_bytes() const noexcept override { return std::size_t{2} << 20; }
    void submit(const ReadRequest& request) override { pending_ = request; }
    void flush() override {}
    ReadResult next() override {
        const ReadRequest request = *pending_;
        pending_.reset();
        const ssize_t got = ::pread(request.file->fd(), request.into.data(), request.into.size(), request.offset);
        return {request.tag, got < 0 ? -std::int64_t{errno} : std::int64_t{got}};
    }

  private:
    std::optional<ReadRequest> pending_;
};

}  // namespace

std::unique_ptr<ReadChannel> PreadReader::channel() { return std::make_unique<PreadChannel>(); }

}  // namespace emoe::io
