// A reader whose n-th read goes wrong, for tests of what happens then.
#pragma once

#include <memory>
#include <string>

#include "core/reader.hpp"

namespace emoe::io {

struct Faults {
    std::int64_t fail_at = -1;   // this read, counted from 0 over all channels, ends with `error_number`; -1: none
    int error_number = 5;        // EIO
    std::int64_t short_at = -1;  // this read gives half of its bytes; -1: none
    int delay_ms = 0;            // every read takes at least this long
};

std::shared_ptr<Reader> make_faulty_reader(std::shared_ptr<Reader> reader, const Faults& faults);

}  // namespace emoe::io
