#include "io/faulty_reader.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <utility>

namespace emoe::io {
namespace {

struct Shared {
    Faults faults;
    std::atomic<std::int64_t> reads{0};
};

class FaultyChannel final : public ReadChannel {
  public:
    FaultyChannel(std::unique_ptr<ReadChannel> inner, std::shared_ptr<Shared> shared)
        : inner_(std::move(inner)), shared_(std::move(shared)) {}
    std::size_t depth() const noexcept override { return inner_->depth(); }
    std::size_t chunk_bytes() const noexcept override { return inner_->chunk_bytes(); }
    void submit(const ReadRequest& request) override { inner_->submit(request); }
    void flush() override { inner_->flush(); }
    ReadResult next() override {
        const Faults& faults = shared_->faults;
        if (faults.delay_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(faults.delay_ms));
        ReadResult result = inner_->next();
        const std::int64_t number = shared_->reads.fetch_add(1, std::memory_order_relaxed);
        if (number == faults.fail_at) result.result = -faults.error_number;
        if (number == faults.short_at && result.result > 1) result.result /= 2;
        return result;
    }

  private:
    std::unique_ptr<ReadChannel> inner_;
    std::shared_ptr<Shared> shared_;
};

class FaultyReader final : public Reader {
  public:
    FaultyReader(std::shared_ptr<Reader> inner, const Faults& faults)
        : inner_(std::move(inner)), shared_(std::make_shared<Shared>(faults)) {}
    std::string name() const override { return "faulty " + inner_->name(); }
    bool direct() const noexcept override { return inner_->direct(); }
    std::string note() const override { return inner_->note(); }
    std::unique_ptr<File> open(std::shared_ptr<const SourceFile> source) override {
        return inner_->open(std::move(source));
    }
    std::unique_ptr<ReadChannel> channel() override {
        return std::make_unique<FaultyChannel>(inner_->channel(), shared_);
    }

  private:
    std::shared_ptr<Reader> inner_;
    std::shared_ptr<Shared> shared_;
};

}  // namespace

std::shared_ptr<Reader> make_faulty_reader(std::shared_ptr<Reader> reader, const Faults& faults) {
    return std::make_shared<FaultyReader>(std::move(reader), faults);
}

}  // namespace emoe::io
