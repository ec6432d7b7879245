// The compute side of emoe._C: addresses and shapes in, no tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/gather_op.hpp"
#include "core/attention.hpp"
#include "core/attention_block.hpp"
#include "core/backend.hpp"
#include "core/gather_mlp.hpp"
#include "core/linear.hpp"
#include "core/parallel.hpp"
#include "core/weights.hpp"
#include "cpu/attention.hpp"
#include "cpu/attention_block.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/expand.hpp"
#include "cpu/fit.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/linear.hpp"

namespace py = pybind11;

namespace emoe {
namespace {

// What computes on the host; its memory is a Slab's own affair.
Backend& host() {
    static cpu::CpuBackend backend;
    return backend;
}

bool supports(const MlpLayout& layout) {
    GatherMlp op;
    op.layout = layout;
    return host().supports(op);
}

MlpLayout make_layout(std::int64_t hidden, std::int64_t intermediate, std::int64_t hidden_out, const std::string& dtype,
                      bool has_gate, bool interleaved, bool transposed, const std::string& activation,
                      std::int64_t gate_up_offset, std::int64_t down_offset, float alpha, float limit,
                      std::int64_t gate_up_bias_offset, std::int64_t down_bias_offset) {
    MlpLayout layout;
    layout.hidden = hidden;
    layout.intermediate = intermediate;
    layout.hidden_out = hidden_out;
    layout.dtype = parse_dtype(dtype);
    layout.has_gate = has_gate;
    layout.interleaved = interleaved;
    layout.transposed = transposed;
    layout.activation = parse_activation(activation);
    layout.alpha = alpha;
    layout.limit = limit;
    layout.gate_up_offset = gate_up_offset;
    layout.gate_up_bias_offset = gate_up_bias_offset;
    layout.down_offset = down_offset;
    layout.down_bias_offset = down_bias_offset;
    validate(layout);
    return layout;
}

Weights make_weights(const std::string& codes, std::int64_t rows, std::int64_t depth, std::int64_t first,
                     std::int64_t step, std::int64_t count, const std::map<std::string, std::int64_t>& planes,
                     const std::string& scale, std::pair<std::int64_t, std::int64_t> scale_block,
                     const std::optional<std::tuple<std::int64_t, std::int64_t, std::string>>& bias) {
    Weights weights;
    weights.codes = parse_codes(codes);
    weights.rows = rows;
    weights.depth = depth;
    weights.first = first;
    weights.step = step;
    weights.count = count;
    for (const auto& [plane, offset] : planes) set_plane(weights, plane, offset);
    weights.scale = parse_scale(scale);
    weights.scale_rows = scale_block.first;
    weights.scale_cols = scale_block.second;
    if (bias) {
        weights.bias = std::get<0>(*bias);
        weights.bias_step = std::get<1>(*bias);
        weights.bias_dtype = parse_dtype(std::get<2>(*bias));
        if (weights.bias < 0)
            throw Error(ErrorKind::kConfig, "bias at " + std::to_string(weights.bias) + " is no offset");
    }
    validate(weights, "weights");
    return weights;
}

py::array_t<float> expand(const Weights& weights, std::uintptr_t slot_address, std::int64_t row, std::int64_t first,
                          std::int64_t last) {
    if (row < 0 || row >= weights.count || first < 0 || last < first || last > weights.depth) {
        throw Error(ErrorKind::kConfig, "row " + std::to_string(row) + ", columns " + std::to_string(first) + " to " +
                                            std::to_string(last) + ": there are " + std::to_string(weights.count) +
                                            " rows of " + std::to_string(weights.depth));
    }
    py::array_t<float> out(last - first);
    cpu::expand(weights, pointer<const unsigned char>(slot_address), row, first, last, out.mutable_data());
    return out;
}

MlpLayout make_encoded_layout(std::int64_t hidden, std::int64_t intermediate, std::int64_t hidden_out, bool has_gate,
                              bool interleaved, const std::string& activation, const Weights& gate, const Weights& down,
                              const std::optional<Weights>& up, float alpha, float limit) {
    if (has_gate != up.has_value()) throw Error(ErrorKind::kConfig, "up belongs to has_gate=True, and only to it");
    MlpLayout layout;
    layout.hidden = hidden;
    layout.intermediate = intermediate;
    layout.hidden_out = hidden_out;
    layout.has_gate = has_gate;
    layout.interleaved = interleaved;
    layout.activation = parse_activation(activation);
    layout.alpha = alpha;
    layout.limit = limit;
    layout.encoded = true;
    layout.gate = gate;
    if (up) layout.up = *up;
    layout.down = down;
    validate(layout);
    return layout;
}

void gather_mlp(const MlpLayout& layout, std::uintptr_t slab_address, std::int64_t slot_bytes, const py::array& slot_of,
                std::uintptr_t hidden_ptr, const std::string& hidden_dtype, std::int64_t tokens,
                std::uintptr_t index_ptr, std::uintptr_t weights_ptr, const std::string& weights_dtype,
                std::int64_t top_k, std::uintptr_t out_ptr, const std::string& mode) {
    GatherMlp op = gather_op(layout, pointer<const std::byte>(slab_address), slot_bytes, slot_of, hidden_ptr,
                             hidden_dtype, tokens, index_ptr, weights_ptr, weights_dtype, top_k, out_ptr);
    const bool sum = mode == "sum";
    op.mode = sum ? OutMode::kPairs : parse_out_mode(mode);
    const py::gil_scoped_release release;
    if (sum) return cpu::gather_sum(op, pointer<void>(out_ptr));
    host().gather_mlp(op, nullptr);
}

void linear(const Weights& weights, std::uintptr_t address, std::uintptr_t x_ptr, const std::string& dtype,
            std::int64_t tokens, std::uintptr_t y_ptr, std::uintptr_t bias_ptr, const std::string& bias_dtype) {
    Linear op;
    op.weights = weights;
    op.base = pointer<const std::byte>(address);
    op.x = pointer<const void>(x_ptr);
    op.dtype = parse_dtype(dtype);
    op.tokens = tokens;
    op.bias = pointer<const void>(bias_ptr);
    op.bias_dtype = parse_dtype(bias_dtype);
    op.y = pointer<void>(y_ptr);
    const py::gil_scoped_release release;
    cpu::linear(op);
}

using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

HeadStrides strides(const Strides& given) { return {std::get<0>(given), std::get<1>(given), std::get<2>(given)}; }

void attend(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads, std::int64_t keys, std::int64_t depth,
            std::int64_t value_depth, const std::string& dtype, float scale, std::uintptr_t query_ptr,
            const Strides& query_strides, std::uintptr_t key_ptr, const Strides& key_strides, std::uintptr_t value_ptr,
            const Strides& value_strides, std::uintptr_t mask_ptr, const Strides& mask_strides,
            std::uintptr_t out_ptr) {
    Attention op;
    op.batch = batch;
    op.heads = heads;
    op.kv_heads = kv_heads;
    op.keys = keys;
    op.depth = depth;
    op.value_depth = value_depth;
    op.dtype = parse_dtype(dtype);
    op.scale = scale;
    op.query = pointer<const void>(query_ptr);
    op.query_strides = strides(query_strides);
    op.key = pointer<const void>(key_ptr);
    op.key_strides = strides(key_strides);
    op.value = pointer<const void>(value_ptr);
    op.value_strides = strides(value_strides);
    op.mask = pointer<const unsigned char>(mask_ptr);
    op.mask_strides = strides(mask_strides);
    op.out = pointer<void>(out_ptr);
    const py::gil_scoped_release release;
    cpu::attend(op);
}

// weights, address, address of a bias or 0, its dtype
using ProjectionOf = std::tuple<const Weights&, std::uintptr_t, std::uintptr_t, std::string>;
// address of a weight, its width, epsilon
using NormOf = std::tuple<std::uintptr_t, std::int64_t, float>;

AttentionBlock make_block(const std::string& dtype, std::int64_t heads, std::int64_t kv_heads, std::int64_t depth,
                          const ProjectionOf& query, const ProjectionOf& key, const ProjectionOf& value,
                          const ProjectionOf& out, const std::optional<NormOf>& query_norm,
                          const std::optional<NormOf>& key_norm) {
    const auto projection = [](const ProjectionOf& given) {
        const auto& [weights, address, bias, bias_dtype] = given;
        return Projection{weights, pointer<const std::byte>(address), pointer<const void>(bias),
                          parse_dtype(bias_dtype)};
    };
    const auto norm = [](const std::optional<NormOf>& given) {
        if (!given) return BlockNorm{};
        return BlockNorm{pointer<const void>(std::get<0>(*given)), std::get<1>(*given), std::get<2>(*given)};
    };
    AttentionBlock block{parse_dtype(dtype), heads,           kv_heads,          depth,
                         projection(query),  projection(key), projection(value), projection(out),
                         norm(query_norm),   norm(key_norm)};
    validate(block);
    return block;
}

void attention_step(const AttentionBlock& block, std::int64_t batch, std::uintptr_t x_ptr, std::uintptr_t cos_ptr,
                    std::uintptr_t sin_ptr, std::int64_t rotated, std::int64_t position_stride, std::int64_t keys,
                    std::uintptr_t key_ptr, const Strides& key_strides, std::uintptr_t value_ptr,
                    const Strides& value_strides, std::uintptr_t mask_ptr, const Strides& mask_strides, float scale,
                    std::uintptr_t y_ptr) {
    AttentionStep step;
    step.batch = batch;
    step.x = pointer<const void>(x_ptr);
    step.cos = pointer<const void>(cos_ptr);
    step.sin = pointer<const void>(sin_ptr);
    step.rotated = rotated;
    step.position_stride = position_stride;
    step.keys = keys;
    step.key = pointer<void>(key_ptr);
    step.key_strides = strides(key_strides);
    step.value = pointer<void>(value_ptr);
    step.value_strides = strides(value_strides);
    step.mask = pointer<const unsigned char>(mask_ptr);
    step.mask_strides = strides(mask_strides);
    step.scale = scale;
    step.y = pointer<void>(y_ptr);
    const py::gil_scoped_release release;
    cpu::attention_step(block, step);
}

void rms_norm(std::int64_t rows, std::int64_t width, const std::string& dtype, float epsilon, std::uintptr_t x_ptr,
              std::uintptr_t weight_ptr, std::uintptr_t out_ptr) {
    const RmsNorm op{rows,
                     width,
                     parse_dtype(dtype),
                     epsilon,
                     pointer<const void>(x_ptr),
                     pointer<const void>(weight_ptr),
                     pointer<void>(out_ptr)};
    const py::gil_scoped_release release;
    cpu::rms_norm(op);
}

void combine(std::uintptr_t pairs_ptr, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out,
             std::uintptr_t out_ptr, const std::string& out_dtype) {
    const DType dtype = parse_dtype(out_dtype);
    const py::gil_scoped_release release;
    cpu::combine(pointer<const float>(pairs_ptr), tokens, top_k, hidden_out, pointer<void>(out_ptr), dtype);
}

void fit_affine(std::uintptr_t numbers_ptr, std::int64_t groups, std::int64_t size, int most, float first, int steps,
                std::uintptr_t scale_ptr, std::uintptr_t offset_ptr) {
    const py::gil_scoped_release release;
    cpu::fit_affine(pointer<const float>(numbers_ptr), groups, size, most, first, steps, pointer<float>(scale_ptr),
                    pointer<float>(offset_ptr));
}

void fit_symmetric(std::uintptr_t numbers_ptr, std::int64_t groups, std::int64_t size, int most, bool squared,
                   std::uintptr_t scale_ptr) {
    const py::gil_scoped_release release;
    cpu::fit_symmetric(pointer<const float>(numbers_ptr), groups, size, most, squared, pointer<float>(scale_ptr));
}

}  // namespace

void bind_ops(py::module_& module) {
    using py::arg;
    py::class_<Weights>(module, "Weights", "A matrix of an expert, encoded; planes and bias at bytes of its slot.")
        .def(py::init(&make_weights), py::kw_only(), arg("codes"), arg("rows"), arg("depth"), arg("first"), arg("step"),
             arg("count"), arg("planes"), arg("scale"), arg("scale_block"), arg("bias") = py::none())
        .def_property_readonly("extent", &extent, "Bytes of the smallest slot that holds its arrays.")
        .def("expand", &expand, arg("slot_address"), arg("row"), arg("first"), arg("last"),
             "Columns [first, last) of a row, float32: the reference of the kernels, slow.");
    py::class_<MlpLayout>(module, "MlpLayout", "How one expert's tensors lie in a slot; offsets in bytes, -1: no bias.")
        .def(py::init(&make_layout), arg("hidden"), arg("intermediate"), arg("hidden_out"), arg("dtype"),
             arg("has_gate"), arg("interleaved"), arg("transposed"), arg("activation"), py::kw_only(),
             arg("gate_up_offset"), arg("down_offset"), arg("alpha") = 1.702F, arg("limit") = 0.0F,
             arg("gate_up_bias_offset") = -1, arg("down_bias_offset") = -1)
        .def_static("encoded", &make_encoded_layout, py::kw_only(), arg("hidden"), arg("intermediate"),
                    arg("hidden_out"), arg("has_gate"), arg("interleaved"), arg("activation"), arg("gate"), arg("down"),
                    arg("up") = py::none(), arg("alpha") = 1.702F, arg("limit") = 0.0F,
                    "The layout of an expert whose matrices are encoded.")
        .def_readonly("hidden", &MlpLayout::hidden)
        .def_readonly("intermediate", &MlpLayout::intermediate)
        .def_readonly("hidden_out", &MlpLayout::hidden_out)
        .def_readonly("has_gate", &MlpLayout::has_gate)
        .def_readonly("interleaved", &MlpLayout::interleaved)
        .def_readonly("transposed", &MlpLayout::transposed)
        .def_readonly("alpha", &MlpLayout::alpha)
        .def_readonly("limit", &MlpLayout::limit)
        .def_readonly("gate_up_offset", &MlpLayout::gate_up_offset)
        .def_readonly("gate_up_bias_offset", &MlpLayout::gate_up_bias_offset)
        .def_readonly("down_offset", &MlpLayout::down_offset)
        .def_readonly("down_bias_offset", &MlpLayout::down_bias_offset)
        .def_property_readonly(
            "dtype",
            [](const MlpLayout& a) { return a.encoded ? std::string("encoded") : std::string(dtype_name(a.dtype)); })
        .def_property_readonly("activation",
                               [](const MlpLayout& a) { return std::string(activation_name(a.activation)); })
        .def_property_readonly("slot_extent", &slot_extent, "Bytes of the smallest slot that holds the layout.");
    module.def("isa", [] { return std::string(cpu::active_kernels().name); }, "The instruction set in use.");
    module.def("available_isas", &cpu::available_isas, "What this CPU can run, best first.");
    module.def("set_threads", &set_threads, arg("n"), "Threads of the kernels, for the whole process.");
    module.def("threads", &threads, "How many threads the next call of a kernel uses.");
    module.def("supports", &supports, arg("layout"));
    module.def("gather_mlp", &gather_mlp, arg("layout"), arg("slab_address"), arg("slot_bytes"), arg("slot_of"),
               arg("hidden_ptr"), arg("hidden_dtype"), arg("tokens"), arg("index_ptr"), arg("weights_ptr"),
               arg("weights_dtype"), arg("top_k"), arg("out_ptr"), arg("mode"));
    module.def("linear", &linear, arg("weights"), arg("address"), arg("x_ptr"), arg("dtype"), arg("tokens"),
               arg("y_ptr"), arg("bias_ptr") = 0, arg("bias_dtype") = "float32");
    module.def("attend", &attend, py::kw_only(), arg("batch"), arg("heads"), arg("kv_heads"), arg("keys"), arg("depth"),
               arg("value_depth"), arg("dtype"), arg("scale"), arg("query_ptr"), arg("query_strides"), arg("key_ptr"),
               arg("key_strides"), arg("value_ptr"), arg("value_strides"), arg("mask_ptr"), arg("mask_strides"),
               arg("out_ptr"));
    py::class_<AttentionBlock>(module, "AttentionBlock", "An attention block whose decode steps are one call.")
        .def(py::init(&make_block), py::kw_only(), arg("dtype"), arg("heads"), arg("kv_heads"), arg("depth"),
             arg("query"), arg("key"), arg("value"), arg("out"), arg("query_norm") = py::none(),
             arg("key_norm") = py::none())
        .def("step", &attention_step, arg("batch"), arg("x_ptr"), arg("cos_ptr"), arg("sin_ptr"), arg("rotated"),
             arg("position_stride"), arg("keys"), arg("key_ptr"), arg("key_strides"), arg("value_ptr"),
             arg("value_strides"), arg("mask_ptr"), arg("mask_strides"), arg("scale"), arg("y_ptr"));
    module.def("rms_norm", &rms_norm, arg("rows"), arg("width"), arg("dtype"), arg("epsilon"), arg("x_ptr"),
               arg("weight_ptr"), arg("out_ptr"));
    module.def("combine", &combine, arg("pairs_ptr"), arg("tokens"), arg("top_k"), arg("hidden_out"), arg("out_ptr"),
               arg("out_dtype"));
    module.def("fit_affine", &fit_affine, arg("numbers_ptr"), arg("groups"), arg("size"), arg("most"), arg("first"),
               arg("steps"), arg("scale_ptr"), arg("offset_ptr"),
               "Scale and offset [groups] of numbers [groups, size], all float32, by the thread that calls.");
    module.def("fit_symmetric", &fit_symmetric, arg("numbers_ptr"), arg("groups"), arg("size"), arg("most"),
               arg("squared"), arg("scale_ptr"), "Scale [groups] of numbers [groups, size].");
    module.def(
        "read_seconds",
        [](std::uintptr_t address, std::int64_t bytes) {
            const py::gil_scoped_release release;
            return cpu::read_seconds(pointer<const void>(address), bytes);
        },
        arg("address"), arg("nbytes"), "Seconds to read `nbytes` once with every thread (benchmarks).");
}

}  // namespace emoe
