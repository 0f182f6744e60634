// The Python module pke_fast._native. Tensors come as addresses and sizes: the Python side has checked them and holds
// them while the call runs. The GIL is released. This is the only file that may include pybind11: its headers lie
// elsewhere at every isolated build, and what includes them is compiled again.
#include <pybind11/pybind11.h>

#include <string>

#include "select_hotspots.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

pke_fast::HotspotQuery query(std::uintptr_t scores, std::size_t rows, std::size_t layers, std::size_t neurons,
                             std::size_t k, std::size_t first, std::size_t end, std::size_t layer_cap,
                             std::uintptr_t exclude, float minimum) {
    return {pointer<const void>(scores),          rows,   layers, neurons, k, first, end, layer_cap,
            pointer<const std::uint8_t>(exclude), minimum};
}

pke_fast::HotspotResult result(std::uintptr_t layer_ptr, std::uintptr_t neurons, std::uintptr_t nan_counts) {
    return {pointer<std::int64_t>(layer_ptr), pointer<std::int64_t>(neurons), pointer<std::int64_t>(nan_counts)};
}

void bind_select_hotspots(py::module_& module) {
    py::class_<pke_fast::HotspotQuery>(module, "HotspotQuery", "See select_hotspots.h.")
        .def(py::init(&query), py::kw_only(), py::arg("scores"), py::arg("rows"), py::arg("layers"), py::arg("neurons"),
             py::arg("k"), py::arg("first"), py::arg("end"), py::arg("layer_cap"), py::arg("exclude"),
             py::arg("minimum"));
    py::class_<pke_fast::HotspotResult>(module, "HotspotResult", "See select_hotspots.h.")
        .def(py::init(&result), py::kw_only(), py::arg("layer_ptr"), py::arg("neurons"), py::arg("nan_counts"));
    module.def("select_hotspots", &pke_fast::select_hotspots, "On the CPU, fp32. See select_hotspots.h.",
               py::call_guard<py::gil_scoped_release>(), py::arg("query"), py::arg("result"));
#ifdef PKE_FAST_CUDA
    py::enum_<pke_fast::ScoreFormat>(module, "ScoreFormat")
        .value("float32", pke_fast::ScoreFormat::kFloat32)
        .value("bfloat16", pke_fast::ScoreFormat::kBFloat16)
        .value("float16", pke_fast::ScoreFormat::kFloat16);
    module.def("hotspot_scratch_size", &pke_fast::hotspot_scratch_size, "In bytes.", py::arg("query"));
    module.def(
        "select_hotspots_cuda",
        [](const pke_fast::HotspotQuery& asked, pke_fast::ScoreFormat format, const pke_fast::HotspotResult& to,
           std::uintptr_t scratch, std::uintptr_t stream) {
            pke_fast::select_hotspots_cuda(asked, format, to, pointer<void>(scratch), pointer<void>(stream));
        },
        "On the current CUDA device; doesn't wait for the result. See select_hotspots.h.",
        py::call_guard<py::gil_scoped_release>(), py::arg("query"), py::arg("format"), py::arg("result"),
        py::arg("scratch"), py::arg("stream"));
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ and CUDA parts of pke_fast; called by pke_fast.kernels only.";
    py::list architectures;  // what there is machine code for; none where it was built without CUDA
#ifdef PKE_FAST_CUDA
    for (int number : {PKE_FAST_CUDA}) architectures.append("sm_" + std::to_string(number));
#endif
    module.attr("cuda_architectures") = architectures;
    bind_select_hotspots(module);
}
