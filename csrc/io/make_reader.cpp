#include "io/make_reader.hpp"

#include "core/error.hpp"
#include "io/pread_reader.hpp"
#include "io/uring_reader.hpp"

namespace emoe::io {

std::shared_ptr<Reader> make_reader(const std::string& kind, bool direct) {
    if (kind == "pread") return std::make_shared<PreadReader>(direct, "");
    if (kind != "auto" && kind != "uring") {
        throw Error(ErrorKind::kConfig, "reader '" + kind + "' is not one of: auto, uring, pread");
    }
    const std::string refusal = uring_refusal();
    if (refusal.empty()) return std::make_shared<UringReader>(direct, "");
    if (kind == "uring") throw Error(ErrorKind::kBackendUnavailable, "reader 'uring': " + refusal);
    return std::make_shared<PreadReader>(direct, refusal + ", so pread is used");
}

}  // namespace emoe::io
