// The CPU as a backend, slabs cut from any backend, and a queue that refuses slots it cannot read into.
#include "core/backend.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "core/slab.hpp"
#include "core/transfer.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/gather_mlp.hpp"
#include "tests/check.hpp"
#include "tests/fake_reader.hpp"

using namespace emoe;

namespace {

// Counts what is allocated; pretends that its memory is a device's.
class DeviceLike final : public Backend {
  public:
    std::size_t allocated = 0;

    std::string_view name() const noexcept override { return "device-like"; }
    bool supports(const GatherMlp&) const noexcept override { return false; }
    Memory allocate(std::size_t bytes) override {
        Memory memory = cpu_.allocate(bytes);
        allocated += bytes;
        memory.host = false;
        return memory;
    }
    void free(Memory memory) noexcept override {
        allocated -= memory.bytes;
        cpu_.free(memory);
    }
    void gather_mlp(const GatherMlp& op, void* stream) override { cpu_.gather_mlp(op, stream); }

  private:
    cpu::CpuBackend cpu_;
};

}  // namespace

TEST("a slab cuts one allocation into slots of whole pages and gives it back") {
    auto backend = std::make_shared<DeviceLike>();
    {
        const Slab slab(backend, 3, 4097);
        CHECK_EQ(slab.slots(), 3);
        CHECK_EQ(slab.slot_bytes(), 8192);
        CHECK_EQ(backend->allocated, std::size_t{3 * 8192});
        for (std::int64_t s = 0; s < 3; ++s) {
            CHECK(slab.slot(s).data == slab.memory().data + s * 8192);
            CHECK_EQ(slab.slot(s).bytes, std::size_t{8192});
            CHECK_EQ(reinterpret_cast<std::uintptr_t>(slab.slot(s).data) % kPageBytes, std::uintptr_t{0});
        }
        for (const std::int64_t s : {-1, 3}) CHECK_ERROR(ErrorKind::kConfig, slab.slot(s));
    }
    CHECK_EQ(backend->allocated, std::size_t{0});
}

TEST("a slab without slots or without bytes is refused, and so is one that no machine could hold") {
    auto backend = std::make_shared<cpu::CpuBackend>();
    CHECK_ERROR(ErrorKind::kConfig, Slab(backend, 0, 4096));
    CHECK_ERROR(ErrorKind::kConfig, Slab(backend, 4, 0));
    CHECK_ERROR(ErrorKind::kConfig, Slab(backend, std::int64_t{1} << 40, std::int64_t{1} << 40));
    CHECK_ERROR(ErrorKind::kBudget, Slab(backend, std::int64_t{1} << 20, std::int64_t{1} << 40));
}

TEST("fresh memory of the CPU backend is zero and the host's") {
    cpu::CpuBackend backend;
    const Memory memory = backend.allocate(10000);
    CHECK(memory.host);
    CHECK(std::all_of(memory.data, memory.data + 10000, [](std::byte b) { return b == std::byte{0}; }));
    backend.free(memory);
}

TEST("the CPU backend computes what its kernels compute, on slots of a slab") {
    auto backend = std::make_shared<cpu::CpuBackend>();
    const Slab slab(backend, 1, 4096);
    const float one = 1.0F, two = 2.0F;
    std::memcpy(slab.slot(0).data, &two, 4);       // [1, 1] up projection, no gate
    std::memcpy(slab.slot(0).data + 64, &one, 4);  // [1, 1] down projection
    const std::int32_t slot_of[] = {0};
    const std::int64_t index[] = {0};
    const float hidden = 3.0F, weight = 0.5F;
    float out = 0.0F;
    GatherMlp op;
    op.layout.hidden = op.layout.intermediate = op.layout.hidden_out = 1;
    op.layout.has_gate = false;
    op.layout.activation = Activation::kIdentity;
    op.layout.down_offset = 64;
    op.slab = slab.memory().data;
    op.slot_bytes = slab.slot_bytes();
    op.slot_of = slot_of;
    op.hidden = &hidden;
    op.tokens = 1;
    op.index = index;
    op.weights = &weight;
    op.top_k = 1;
    op.out = &out;
    CHECK_EQ(backend->name(), std::string_view("cpu"));
    CHECK(backend->supports(op));
    backend->gather_mlp(op, nullptr);
    CHECK_EQ(out, 3.0F);
}

TEST("a queue refuses slots that the host cannot write to") {
    auto slab = std::make_shared<Slab>(std::make_shared<DeviceLike>(), 1, 4096);
    auto table = std::make_shared<RecordTable>();
    const Error error = ERROR_OF(TransferQueue(slab, table, std::make_shared<test::FakeReader>(), 1, 0));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kBackendUnavailable));
    CHECK(error.message.find("'device-like'") != std::string::npos);
}

EMOE_TEST_MAIN
