#include "core/record.hpp"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <utility>

#include "core/error.hpp"

namespace emoe {
namespace {

// Reading this many unneeded bytes costs less than one more read.
constexpr std::int64_t kBridgedGap = 4096;
constexpr std::int64_t kMost = std::int64_t{1} << 46;  // keeps sums and products inside int64

[[noreturn]] void refuse(const Piece& piece, const std::string& what) {
    throw Error(ErrorKind::kConfig, "piece of tensor '" + piece.tensor + "': " + what);
}

void check(const Piece& p, std::int64_t files) {
    const ScatterLayout& a = p.layout;
    const auto text = [](std::int64_t value) { return std::to_string(value); };
    if (p.file < 0 || p.file >= files) refuse(p, "file id " + text(p.file) + " is not one of the " + text(files));
    const std::pair<const char*, std::int64_t> values[] = {
        {"offset", p.offset},
        {"rows", a.rows},
        {"cols", a.cols},
        {"dst_offset_bytes", p.dst_offset},
        {"dst_row_stride", a.row_stride},
        {"dst_col_stride", a.col_stride},
    };
    for (const auto& [name, value] : values) {
        if (value < 0 || value > kMost) refuse(p, std::string(name) + "=" + text(value) + " is out of range");
    }
    if (a.rows < 1 || a.cols < 1) refuse(p, "[" + text(a.rows) + ", " + text(a.cols) + "] has no elements");
    const Encoding source = encoding_of(a.src_dtype);
    if (a.rows > kMost / a.cols || !source.holds(a.rows, a.cols) || p.nbytes != source.nbytes(a.rows, a.cols)) {
        refuse(p, "nbytes=" + text(p.nbytes) + " is not [" + text(a.rows) + ", " + text(a.cols) + "] " +
                      std::string(dtype_name(a.src_dtype)));
    }
    if ((a.rows > 1 && a.row_stride > kMost / a.rows) || (a.cols > 1 && a.col_stride > kMost / a.cols)) {
        refuse(p, "strides (" + text(a.row_stride) + ", " + text(a.col_stride) + ") are out of range");
    }
    if (!can_convert(a.src_dtype, a.dst_dtype)) {
        refuse(p, "no conversion from " + std::string(dtype_name(a.src_dtype)) + " to " +
                      std::string(dtype_name(a.dst_dtype)) + "; there is one between float32, float16 and bfloat16");
    }
}

std::int64_t slot_end(const Piece& p) {
    const ScatterLayout& a = p.layout;
    return p.dst_offset +
           encoding_of(a.dst_dtype).nbytes((a.rows - 1) * a.row_stride + (a.cols - 1) * a.col_stride + 1);
}

void append(Record& record, const Piece& p) {
    const bool plain = is_plain_copy(p.layout);
    const Segment segment{p.offset, p.nbytes, p.dst_offset, plain, p.layout};
    if (!record.extents.empty() && record.extents.back().file == p.file) {
        std::vector<Segment>& segments = record.extents.back().segments;
        Segment& last = segments.back();
        const std::int64_t gap = p.offset - last.end();
        if (gap == 0 && plain && last.plain && last.dst_offset + last.nbytes == p.dst_offset) {
            last.nbytes += p.nbytes;
            return;
        }
        if (gap >= 0 && gap <= kBridgedGap) {
            segments.push_back(segment);
            return;
        }
    }
    record.extents.push_back({p.file, {segment}});
}

}  // namespace

std::int64_t RecordTable::add_file(const std::string& path, std::optional<int> fd,
                                   std::optional<FileIdentity> identity) {
    auto file = std::make_shared<const SourceFile>(path, fd, identity);
    const std::lock_guard lock(mutex_);
    files_.push_back(std::move(file));
    return static_cast<std::int64_t>(files_.size()) - 1;
}

std::int64_t RecordTable::add_record(std::vector<Piece> pieces) {
    if (pieces.empty()) throw Error(ErrorKind::kConfig, "a record needs at least one piece");
    const std::lock_guard lock(mutex_);
    auto record = std::make_shared<Record>();
    for (const Piece& piece : pieces) {
        check(piece, static_cast<std::int64_t>(files_.size()));
        record->bytes += piece.nbytes;
        record->slot_bytes = std::max(record->slot_bytes, slot_end(piece));
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
        return std::pair(a.file, a.offset) < std::pair(b.file, b.offset);
    });
    for (const Piece& piece : pieces) append(*record, piece);
    record->pieces = std::move(pieces);
    records_.push_back(std::move(record));
    return static_cast<std::int64_t>(records_.size()) - 1;
}

std::shared_ptr<const Record> RecordTable::record(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    if (id < 0 || id >= static_cast<std::int64_t>(records_.size())) {
        throw Error(ErrorKind::kConfig,
                    "record " + std::to_string(id) + " is not one of the " + std::to_string(records_.size()));
    }
    return records_[static_cast<std::size_t>(id)];
}

std::shared_ptr<const SourceFile> RecordTable::file(std::int64_t id) const {
    const std::lock_guard lock(mutex_);
    if (id < 0 || id >= static_cast<std::int64_t>(files_.size())) {
        throw Error(ErrorKind::kConfig,
                    "file " + std::to_string(id) + " is not one of the " + std::to_string(files_.size()));
    }
    return files_[static_cast<std::size_t>(id)];
}

std::int64_t RecordTable::files() const {
    const std::lock_guard lock(mutex_);
    return static_cast<std::int64_t>(files_.size());
}

}  // namespace emoe
