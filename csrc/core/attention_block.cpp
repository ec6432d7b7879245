#include "core/attention_block.hpp"

#include <string>

#include "core/error.hpp"
#include "core/linear.hpp"

namespace emoe {
namespace {

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorKind::kConfig, why); }

void require_equal(const char* what, std::int64_t value, const char* why, std::int64_t wanted) {
    if (value == wanted) return;
    refuse(std::string(what) + "=" + std::to_string(value) + ", but " + std::string(why) + " is " +
           std::to_string(wanted));
}

void validate(const Projection& projection, const char* name) {
    validate(projection.weights, name);
    if (projection.base == nullptr) refuse(std::string(name) + ": its address is 0");
    require_float("bias", projection.bias_dtype);
}

void validate(const BlockNorm& norm, const char* name, std::int64_t heads, std::int64_t depth) {
    if (norm.weight == nullptr || norm.width == depth || norm.width == heads * depth) return;
    refuse(std::string(name) + ": width=" + std::to_string(norm.width) + " is not that of a head, " +
           std::to_string(depth) + ", nor of all, " + std::to_string(heads * depth));
}

}  // namespace

void validate(const AttentionBlock& block) {
    require_float("the block", block.dtype);
    if (block.heads < 1 || block.kv_heads < 1 || block.heads % block.kv_heads != 0) {
        refuse("heads=" + std::to_string(block.heads) + ", kv_heads=" + std::to_string(block.kv_heads) +
               ": heads are a multiple of kv_heads");
    }
    if (block.depth < 1 || block.depth > kMostHeadDepth) {
        refuse("a head of " + std::to_string(block.depth) + " is not one of 1 to " + std::to_string(kMostHeadDepth));
    }
    validate(block.query, "query");
    validate(block.key, "key");
    validate(block.value, "value");
    validate(block.out, "out");
    const std::int64_t inputs = block.query.weights.depth;
    require_equal("query: count", block.query.weights.count, "heads * depth", block.heads * block.depth);
    require_equal("key: count", block.key.weights.count, "kv_heads * depth", block.kv_heads * block.depth);
    require_equal("value: count", block.value.weights.count, "kv_heads * depth", block.kv_heads * block.depth);
    require_equal("key: depth", block.key.weights.depth, "inputs of query", inputs);
    require_equal("value: depth", block.value.weights.depth, "inputs of query", inputs);
    require_equal("out: depth", block.out.weights.depth, "heads * depth", block.heads * block.depth);
    validate(block.query_norm, "query_norm", block.heads, block.depth);
    validate(block.key_norm, "key_norm", block.kv_heads, block.depth);
}

void validate(const AttentionBlock& block, const AttentionStep& step) {
    if (step.batch < 0 || step.keys < 1) {
        refuse("batch=" + std::to_string(step.batch) + ", keys=" + std::to_string(step.keys) + ": there is a key");
    }
    if (step.rotated < 0 || step.rotated > block.depth || step.rotated % 2 != 0) {
        refuse("rotated=" + std::to_string(step.rotated) + ": an even number of a head's " +
               std::to_string(block.depth));
    }
    if (step.rotated > 0 && (step.cos == nullptr || step.sin == nullptr)) refuse("cos_ptr or sin_ptr is 0");
    if (step.batch > 0 && (step.x == nullptr || step.key == nullptr || step.value == nullptr || step.y == nullptr)) {
        refuse("x_ptr, key_ptr, value_ptr or y_ptr is 0");
    }
}

}  // namespace emoe
