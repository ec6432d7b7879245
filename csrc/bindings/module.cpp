// emoe._C: a table of contents. Takes addresses, shapes and file ranges; knows nothing of torch or models.
#include <pybind11/pybind11.h>

#include "bindings/errors.hpp"

namespace emoe {
void bind_transfer(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_policy(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
}  // namespace emoe

PYBIND11_MODULE(EMOE_MODULE, module) {
    module.doc() = "Native core of emoe: slots, transfers and kernels. emoe/_C.pyi is its reference.";
    emoe::register_errors();
    emoe::bind_transfer(module);
    emoe::bind_ops(module);
    emoe::bind_policy(module);
    emoe::bind_cuda(module);
}
