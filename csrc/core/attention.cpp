#include "core/attention.hpp"

#include <string>

#include "core/error.hpp"

namespace emoe {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorKind::kConfig, why); }

void require_float(DType dtype) {
    if (dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16) return;
    refuse("dtype " + std::string(dtype_name(dtype)) + " is not one of: float32, float16, bfloat16");
}

}  // namespace

void validate(const Attention& op) {
    require_float(op.dtype);
    if (op.batch < 0 || op.heads < 1 || op.kv_heads < 1 || op.keys < 1 || op.heads % op.kv_heads != 0) {
        refuse("batch=" + std::to_string(op.batch) + ", heads=" + std::to_string(op.heads) +
               ", kv_heads=" + std::to_string(op.kv_heads) + ", keys=" + std::to_string(op.keys) +
               ": heads are a multiple of kv_heads, and there is a key");
    }
    for (const std::int64_t depth : {op.depth, op.value_depth}) {
        if (depth < 1 || depth > kMostHeadDepth) {
            refuse("a head of " + std::to_string(depth) + " is not one of 1 to " + std::to_string(kMostHeadDepth));
        }
    }
    if (op.batch > 0 && (op.query == nullptr || op.key == nullptr || op.value == nullptr || op.out == nullptr)) {
        refuse("query_ptr, key_ptr, value_ptr or out_ptr is 0");
    }
}

void validate(const RmsNorm& op) {
    require_float(op.dtype);
    if (op.rows < 0 || op.width < 1) {
        refuse("rows=" + std::to_string(op.rows) + ", width=" + std::to_string(op.width) + " is no shape of a norm");
    }
    if (op.rows > 0 && (op.x == nullptr || op.weight == nullptr || op.out == nullptr)) {
        refuse("x_ptr, weight_ptr or out_ptr is 0");
    }
}

}  // namespace emoe
