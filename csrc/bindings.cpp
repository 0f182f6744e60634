// The Python module pke_fast._native. Tensors come as addresses and sizes: the Python side has checked them and holds
// them while the call runs. The GIL is released. This is the only file that may include pybind11: its headers lie
// elsewhere at every isolated build, and what includes them is compiled again.
#include <pybind11/pybind11.h>

#include "select_hotspots.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

py::tuple select_hotspots(std::uintptr_t scores, std::size_t layers, std::size_t neurons, std::size_t k,
                          std::size_t first, std::size_t end, std::size_t layer_cap, std::uintptr_t exclude,
                          float minimum, std::uintptr_t layer_ptr, std::uintptr_t chosen_neurons) {
    pke_fast::HotspotCounts counts;
    {
        py::gil_scoped_release released;
        counts = pke_fast::select_hotspots({pointer<const float>(scores), layers, neurons, k, first, end, layer_cap,
                                            pointer<const std::uint8_t>(exclude), minimum},
                                           pointer<std::int64_t>(layer_ptr), pointer<std::int64_t>(chosen_neurons));
    }
    return py::make_tuple(counts.chosen, counts.nans);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ parts of pke_fast; called by pke_fast.kernels only.";
    module.def(
        "select_hotspots", &select_hotspots, "Counts of what was chosen and of NaN scores. See select_hotspots.h.",
        py::arg("scores"), py::arg("layers"), py::arg("neurons"), py::arg("k"), py::arg("first"), py::arg("end"),
        py::arg("layer_cap"), py::arg("exclude"), py::arg("minimum"), py::arg("layer_ptr"), py::arg("chosen_neurons"));
}
