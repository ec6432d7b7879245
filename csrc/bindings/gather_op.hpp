// A GatherMlp of what Python gives, for every backend.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <string>

#include "core/error.hpp"
#include "core/gather_mlp.hpp"

namespace emoe {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline GatherMlp gather_op(const MlpLayout& layout, const std::byte* slab, std::int64_t slot_bytes,
                           const pybind11::array& slot_of, std::uintptr_t hidden, const std::string& hidden_dtype,
                           std::int64_t tokens, std::uintptr_t index, std::uintptr_t weights,
                           const std::string& weights_dtype, std::int64_t top_k, std::uintptr_t out) {
    using Slots = pybind11::array_t<std::int32_t, pybind11::array::c_style>;
    if (!pybind11::isinstance<Slots>(slot_of) || slot_of.ndim() != 1) {
        throw Error(ErrorKind::kConfig, "slot_of must be a contiguous int32 numpy array of one dimension");
    }
    GatherMlp op;
    op.layout = layout;
    op.slab = slab;
    op.slot_bytes = slot_bytes;
    op.slot_of = {static_cast<const std::int32_t*>(slot_of.data()), static_cast<std::size_t>(slot_of.size())};
    op.hidden = pointer<const void>(hidden);
    op.hidden_dtype = parse_dtype(hidden_dtype);
    op.tokens = tokens;
    op.index = pointer<const std::int64_t>(index);
    op.weights = pointer<const void>(weights);
    op.weights_dtype = parse_dtype(weights_dtype);
    op.top_k = top_k;
    op.out = pointer<float>(out);
    return op;
}

}  // namespace emoe
