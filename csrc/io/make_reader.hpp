// Readers by name.
#pragma once

#include <memory>
#include <string>

#include "core/reader.hpp"

namespace emoe::io {

// "uring", "pread", or "auto": uring where the kernel allows it, else pread, which note() then says.
// ConfigError names the choices; BackendUnavailable where "uring" was asked for and the kernel refuses.
std::shared_ptr<Reader> make_reader(const std::string& kind, bool direct);

}  // namespace emoe::io
