// What an eviction policy learns, behind emoe/slots/policy.py: picks in, scores out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "core/error.hpp"
#include "core/next_use.hpp"

namespace py = pybind11;

namespace emoe {
namespace {

using Picks = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

void saw(NextUse& learned, const Picks& picks) {
    if (picks.ndim() != 2) throw Error(ErrorKind::kConfig, "picks are [tokens, top_k]");
    learned.saw({picks.data(), static_cast<std::size_t>(picks.size())}, static_cast<std::size_t>(picks.shape(0)));
}

std::int32_t least(NextUse& learned, const std::vector<std::int32_t>& experts) {
    if (experts.empty()) throw Error(ErrorKind::kConfig, "no expert to choose from");
    return experts[learned.least(experts)];
}

py::array_t<float> scores(NextUse& learned, std::int32_t experts) {
    py::array_t<float> result(experts);
    for (std::int32_t i = 0; i < experts; ++i) result.mutable_at(i) = learned.score(i);
    return result;
}

}  // namespace

void bind_policy(py::module_& module) {
    py::class_<NextUse>(module, "NextUse", "Which experts of one layer will be used soon, learned from its picks.")
        .def(py::init<>())
        .def("saw", &saw, py::arg("picks"), "int64 [tokens, top_k] of a step; below 0 or over 65535: no pick.")
        .def("least", &least, py::arg("experts"), "Of these the one least likely to be used soon, the first of equals.")
        .def("scores", &scores, py::arg("experts"), "float32 of experts 0 to `experts` - 1; the higher, the sooner.")
        .def_property_readonly("bytes", &NextUse::bytes, "What was learned takes so many.");
}

}  // namespace emoe
