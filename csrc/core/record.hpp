// Where each expert's bytes lie in files and where they go in a slot. Reads nothing itself; record_pump does.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/fork.hpp"
#include "core/scatter.hpp"
#include "core/source_file.hpp"

namespace emoe {

// One array as it lies in a file, and its place in the slot.
struct Piece {
    std::int64_t file = 0;    // id given by RecordTable::add_file
    std::int64_t offset = 0;  // bytes
    std::int64_t nbytes = 0;
    std::string tensor;           // for error messages
    std::int64_t dst_offset = 0;  // bytes from the start of the slot
    ScatterLayout layout;
};

// A byte range of a file that is either one piece, or neighbouring pieces that land as one run of unchanged bytes.
struct Segment {
    std::int64_t offset;
    std::int64_t nbytes;
    std::int64_t dst_offset;
    bool plain;            // unchanged bytes: may be read straight into the slot
    ScatterLayout layout;  // where not plain
    std::int64_t end() const { return offset + nbytes; }
};

// Segments of one file that are read as one range.
struct Extent {
    std::int64_t file;
    std::vector<Segment> segments;  // ascending, not overlapping
};

struct Record {
    std::vector<Piece> pieces;
    std::vector<Extent> extents;
    std::int64_t bytes = 0;       // to be read, without what alignment adds
    std::int64_t slot_bytes = 0;  // a slot has to have at least these
};

// Grows only; ids are consecutive from 0. Safe to use from several threads; records do not change once added.
class RecordTable {
  public:
    // Opens the file, or takes over a descriptor (SourceFile says how). ReadError.
    std::int64_t add_file(const std::string& path, std::optional<int> fd = {},
                          std::optional<FileIdentity> identity = {});
    std::int64_t add_record(std::vector<Piece> pieces);             // ConfigError where a piece contradicts itself
    std::shared_ptr<const Record> record(std::int64_t id) const;    // ConfigError for an unknown id
    std::shared_ptr<const SourceFile> file(std::int64_t id) const;  // likewise
    std::int64_t files() const;                                     // how many

  private:
    mutable ForkMutex mutex_{ForkMutex::Level::kTable};
    std::vector<std::shared_ptr<const SourceFile>> files_;
    std::vector<std::shared_ptr<const Record>> records_;
};

}  // namespace emoe
