// Records: what is refused, and that any record arrives byte for byte whatever its pieces, alignment and chunks.
#include "core/record.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "core/record_pump.hpp"
#include "core/slab.hpp"
#include "cpu/cpu_backend.hpp"
#include "tests/check.hpp"
#include "tests/fake_reader.hpp"

using namespace emoe;
using emoe::test::FakeReader;
using emoe::test::pattern;

namespace {

Piece bytes_piece(std::int64_t file, std::int64_t offset, std::int64_t nbytes, std::int64_t dst_offset) {
    return {file, offset, nbytes, "t", dst_offset, {DType::kUInt8, DType::kUInt8, 1, nbytes, nbytes, 1}};
}

// What a slot holds after the record has arrived, computed one element at a time; `untouched` elsewhere.
std::vector<std::byte> expected(const Record& record, std::size_t slot_bytes, std::byte untouched) {
    std::vector<std::byte> slot(slot_bytes, untouched);
    for (const Piece& p : record.pieces) {
        const ScatterLayout& a = p.layout;
        const std::int64_t in = itemsize(a.src_dtype);
        const std::int64_t out = itemsize(a.dst_dtype);
        for (std::int64_t r = 0; r < a.rows; ++r) {
            for (std::int64_t c = 0; c < a.cols; ++c) {
                std::byte raw[8];
                for (std::int64_t b = 0; b < in; ++b) raw[b] = pattern(p.offset + (r * a.cols + c) * in + b);
                std::byte* to = slot.data() + p.dst_offset + (r * a.row_stride + c * a.col_stride) * out;
                if (a.src_dtype == a.dst_dtype) {
                    std::memcpy(to, raw, static_cast<std::size_t>(out));
                } else if (a.src_dtype == DType::kBFloat16) {
                    std::uint16_t bits;
                    std::memcpy(&bits, raw, 2);
                    const float value = bf16_to_float(bits);
                    std::memcpy(to, &value, 4);
                } else {
                    float value;
                    std::memcpy(&value, raw, 4);
                    const std::uint16_t bits = float_to_bf16(value);
                    std::memcpy(to, &bits, 2);
                }
            }
        }
    }
    return slot;
}

}  // namespace

TEST("pieces that contradict themselves are refused by name") {
    RecordTable table;
    const std::int64_t file = table.add_file("/proc/self/exe");
    const Piece good{file, 0, 24, "blk.gate", 0, {DType::kFloat32, DType::kBFloat16, 2, 3, 3, 1}};
    const auto refused = [&](auto&& change, const std::string& says) {
        Piece piece = good;
        change(piece);
        const Error error = ERROR_OF(table.add_record({good, piece}));
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kConfig));
        CHECK(error.message.find("'blk.gate'") != std::string::npos);
        CHECK(error.message.find(says) != std::string::npos);
    };
    refused([](Piece& p) { p.file = 1; }, "file id 1");
    refused([](Piece& p) { p.offset = -1; }, "offset=-1");
    refused([](Piece& p) { p.nbytes = 23; }, "nbytes=23");
    refused([](Piece& p) { p.layout.rows = 0; }, "no elements");
    refused([](Piece& p) { p.layout.row_stride = -3; }, "dst_row_stride=-3");
    refused([](Piece& p) { p.layout.col_stride = std::int64_t{1} << 46; }, "strides");
    refused([](Piece& p) { p.dst_offset = -8; }, "dst_offset_bytes=-8");
    refused([](Piece& p) { p.layout.src_dtype = DType::kInt32; }, "no conversion from int32 to bfloat16");
    CHECK_ERROR(ErrorKind::kConfig, table.add_record({}));
    CHECK_EQ(table.add_record({good, good}), 0);
    CHECK_EQ(table.record(0)->bytes, 48);
    CHECK_EQ(table.record(0)->slot_bytes, 12);
    CHECK_ERROR(ErrorKind::kConfig, table.record(1));
    CHECK_ERROR(ErrorKind::kConfig, table.file(-1));
    const Error missing = ERROR_OF(table.add_file("/nonexistent/file"));
    CHECK_EQ(static_cast<int>(missing.kind), static_cast<int>(ErrorKind::kRead));
    CHECK_EQ(missing.file, std::string("/nonexistent/file"));
}

TEST("neighbouring ranges are read together, distant ones and other files apart") {
    RecordTable table;
    table.add_file("/proc/self/exe");
    table.add_file("/proc/self/exe");
    const auto extents = [&](std::vector<Piece> pieces) {
        std::vector<std::size_t> sizes;
        for (const Extent& e : table.record(table.add_record(std::move(pieces)))->extents) {
            sizes.push_back(e.segments.size());
        }
        return sizes;
    };
    using Sizes = std::vector<std::size_t>;
    CHECK(extents({bytes_piece(0, 100, 50, 0), bytes_piece(0, 150, 50, 50)}) == (Sizes{1}));       // one run
    CHECK(extents({bytes_piece(0, 150, 50, 50), bytes_piece(0, 100, 50, 0)}) == (Sizes{1}));       // in any order
    CHECK(extents({bytes_piece(0, 100, 50, 50), bytes_piece(0, 150, 50, 0)}) == (Sizes{2}));       // other place
    CHECK(extents({bytes_piece(0, 100, 50, 0), bytes_piece(0, 160, 50, 50)}) == (Sizes{2}));       // small gap
    CHECK(extents({bytes_piece(0, 100, 50, 0), bytes_piece(0, 99999, 50, 50)}) == (Sizes{1, 1}));  // large gap
    CHECK(extents({bytes_piece(0, 100, 50, 0), bytes_piece(1, 150, 50, 50)}) == (Sizes{1, 1}));
    CHECK(extents({bytes_piece(0, 100, 50, 0), bytes_piece(0, 120, 50, 50)}) == (Sizes{1, 1}));  // they overlap
}

TEST("an aligned record is read straight into its slot in one read, an unaligned one through chunks") {
    auto table = std::make_shared<RecordTable>();
    table->add_file("/proc/self/exe");
    const Slab slab(std::make_shared<cpu::CpuBackend>(), 1, 300000);
    const auto reads = [&](std::int64_t offset, std::int64_t nbytes, std::int64_t dst, std::size_t chunk = 8192) {
        auto reader = std::make_shared<FakeReader>();
        reader->chunk_bytes = chunk;
        OpenFiles files(table, reader);
        RecordPump pump(reader->channel(), files);
        const std::int64_t id = table->add_record({bytes_piece(0, offset, nbytes, dst)});
        pump.start(1, table->record(id), {slab.slot(0).data, slab.slot(0).bytes});
        while (!pump.step()) continue;
        return reader->asked().size();
    };
    CHECK_EQ(reads(8192, 200000, 0), std::size_t{1});          // runs over its end, into nothing
    CHECK_EQ(reads(8192 + 512, 200000, 512), std::size_t{2});  // congruent: the head, then the rest in place
    CHECK_EQ(reads(8192 + 512, 200000, 0), std::size_t{25});   // chunks of 8192
    CHECK_EQ(reads(8192, 200000, 512), std::size_t{25});
    CHECK_EQ(reads(8192 + 512, 65536, 0, 65536), std::size_t{1});  // a short rest joins the chunk before it
    CHECK_EQ(reads(8192 + 512, 135000, 0, 65536), std::size_t{2});
}

TEST("any record arrives byte for byte, whatever its pieces, alignment, chunks and order of completion") {
    std::mt19937_64 random(7);
    const auto below = [&](std::int64_t n) {
        return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
    };
    const std::pair<DType, DType> types[] = {{DType::kUInt8, DType::kUInt8},      {DType::kBFloat16, DType::kBFloat16},
                                             {DType::kFloat32, DType::kFloat32},  {DType::kInt64, DType::kInt64},
                                             {DType::kFloat32, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};
    constexpr std::int64_t kSlot = 1 << 19;
    const Slab slab(std::make_shared<cpu::CpuBackend>(), 2, kSlot);
    for (int round = 0; round < 150; ++round) {
        auto table = std::make_shared<RecordTable>();
        auto reader = std::make_shared<FakeReader>();
        reader->depth = static_cast<std::size_t>(1 + below(5));
        reader->chunk_bytes = static_cast<std::size_t>(8192 << below(4));
        reader->alignment = below(4) == 0 ? 1 : 4096;
        reader->newest_first = below(2) != 0;
        if (reader->depth == 1) {  // so that the next read is the same one again, and brings something new
            reader->change = [](std::int64_t n, std::int64_t result) { return n % 3 == 1 ? (result + 1) / 2 : result; };
        }
        table->add_file("/proc/self/exe");
        table->add_file("/proc/self/exe");
        std::vector<Piece> pieces;
        std::int64_t place = below(3) == 0 ? below(64) * 64 : 0;
        std::int64_t offset = below(3) == 0 ? below(100000) : 4096 * below(20);
        const bool aligned = below(3) == 0;
        for (std::int64_t i = 1 + below(5); i > 0; --i) {
            const auto [src, dst] = types[below(6)];
            const std::int64_t in = itemsize(src), out = itemsize(dst);
            std::int64_t rows = 1 + below(40), cols = 1 + below(i % 2 != 0 ? 60 : 2000 / in);
            if (aligned) rows = 1, cols = (1 + below(8)) * 4096;
            Piece p{below(2), offset, rows * cols * in, "t", place, {src, dst, rows, cols, cols, 1}};
            if (!aligned && below(3) == 0) p.layout.row_stride = 1, p.layout.col_stride = rows;  // transposed
            if (!aligned && below(4) == 0) p.layout.row_stride *= 2, p.layout.col_stride *= 2;   // interleaved
            const std::int64_t end =
                place + ((rows - 1) * p.layout.row_stride + (cols - 1) * p.layout.col_stride + 1) * out;
            if (end > kSlot) break;
            place = end + (aligned ? 0 : below(2) * below(100));
            offset += p.nbytes + (below(2) != 0 ? 0 : below(10000));
            if (below(5) == 0) offset += 100000 + below(9);
            pieces.push_back(p);
        }
        if (pieces.empty()) continue;
        std::shuffle(pieces.begin(), pieces.end(), random);
        const auto record = table->record(table->add_record(pieces));
        OpenFiles files(table, reader);
        RecordPump pump(reader->channel(), files);
        const Memory slot = slab.slot(0);
        std::memset(slot.data, 0xA5, 2 * kSlot);
        pump.start(9, record, {slot.data, slot.bytes});
        std::optional<RecordPump::Finished> finished;
        while (!(finished = pump.step())) continue;
        CHECK_EQ(finished->id, std::uint64_t{9});
        CHECK(!finished->error);
        CHECK(!pump.busy());
        const std::vector<std::byte> want = expected(*record, static_cast<std::size_t>(kSlot), std::byte{0xA5});
        CHECK(std::memcmp(slot.data, want.data(), static_cast<std::size_t>(record->slot_bytes)) == 0);
        const std::byte* next_slot = slab.slot(1).data;
        CHECK(std::all_of(next_slot, next_slot + kSlot, [](std::byte b) { return b == std::byte{0xA5}; }));
    }
}

EMOE_TEST_MAIN
