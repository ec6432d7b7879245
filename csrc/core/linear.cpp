#include "core/linear.hpp"

#include <string>

#include "core/error.hpp"

namespace emoe {

void require_float(const char* what, DType dtype) {
    if (dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16) return;
    throw Error(ErrorKind::kConfig, std::string(what) + " of " + std::string(dtype_name(dtype)) +
                                        " is not one of: float32, float16, bfloat16");
}

void validate(const Linear& op) {
    validate(op.weights, "weights");
    require_float("x", op.dtype);
    require_float("bias", op.bias_dtype);
    if (op.tokens < 0) throw Error(ErrorKind::kConfig, "tokens=" + std::to_string(op.tokens) + " is negative");
    if (op.tokens > 0 && (op.base == nullptr || op.x == nullptr || op.y == nullptr)) {
        throw Error(ErrorKind::kConfig, "address, x_ptr or y_ptr is 0");
    }
}

}  // namespace emoe
