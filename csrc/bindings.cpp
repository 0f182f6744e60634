// The Python module pke_fast._native. Tensors come as addresses and sizes: the Python side has checked them and holds
// them while the call runs. The GIL is released. This is the only file that may include pybind11: its headers lie
// elsewhere at every isolated build, and what includes them is compiled again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "column_grad_norm.h"
#include "glu_score.h"
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

pke_fast::GluShape glu_shape(int type, int act, std::int64_t tokens, std::int64_t neurons, std::int64_t requests,
                             std::uintptr_t offsets, std::uintptr_t mask) {
    return {static_cast<pke_fast::Dtype>(type),   static_cast<pke_fast::Activation>(act), tokens, neurons, requests,
            pointer<const std::int64_t>(offsets), pointer<const std::uint8_t>(mask)};
}

// A tensor's address and the elements from one row to the next.
using Strided = std::pair<std::uintptr_t, std::int64_t>;

pke_fast::Matrix matrix(Strided tensor) { return {pointer<const void>(tensor.first), tensor.second}; }

pke_fast::OutputMatrix output(Strided tensor) { return {pointer<void>(tensor.first), tensor.second}; }

void glu_score_fwd(int type, int act, std::int64_t tokens, std::int64_t neurons, std::int64_t requests,
                   std::uintptr_t offsets, std::uintptr_t mask, Strided gate, Strided up, Strided h,
                   std::uintptr_t mean, std::uintptr_t peak, std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::glu_score_fwd(glu_shape(type, act, tokens, neurons, requests, offsets, mask), matrix(gate), matrix(up),
                            output(h), pointer<float>(mean), pointer<float>(peak), threads);
}

void glu_score_bwd(int type, int act, std::int64_t tokens, std::int64_t neurons, std::int64_t requests,
                   std::uintptr_t offsets, std::uintptr_t mask, Strided dh, Strided gate, Strided up, Strided dgate,
                   Strided dup, std::uintptr_t path, std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::glu_score_bwd(glu_shape(type, act, tokens, neurons, requests, offsets, mask), matrix(dh), matrix(gate),
                            matrix(up), output(dgate), output(dup), pointer<float>(path), threads);
}

// requests: (first, tokens, address of the Gram matrix, address of the norms) each.
void gram_norms(const std::vector<std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>>& requests,
                std::uintptr_t h, std::int64_t stride, int type, std::int64_t neurons, std::size_t threads) {
    py::gil_scoped_release released;
    std::vector<pke_fast::GramRequest> grams;
    for (const auto& [first, tokens, gram, norms] : requests)
        grams.push_back({first, tokens, pointer<const float>(gram), pointer<float>(norms)});
    pke_fast::gram_norms(grams.data(), grams.size(), pointer<const void>(h), stride, static_cast<pke_fast::Dtype>(type),
                         neurons, threads);
}

void column_norms(std::uintptr_t product, std::int64_t rows, std::int64_t columns, std::uintptr_t norms,
                  std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::column_norms(pointer<const float>(product), rows, columns, pointer<float>(norms), threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ parts of pke_fast; called by pke_fast.kernels only.";
    module.def(
        "select_hotspots", &select_hotspots, "Counts of what was chosen and of NaN scores. See select_hotspots.h.",
        py::arg("scores"), py::arg("layers"), py::arg("neurons"), py::arg("k"), py::arg("first"), py::arg("end"),
        py::arg("layer_cap"), py::arg("exclude"), py::arg("minimum"), py::arg("layer_ptr"), py::arg("chosen_neurons"));

    module.def("glu_score_fwd", &glu_score_fwd, "See glu_score.h. An address of 0: there is none.", py::arg("type"),
               py::arg("act"), py::arg("tokens"), py::arg("neurons"), py::arg("requests"), py::arg("offsets"),
               py::arg("mask"), py::arg("gate"), py::arg("up"), py::arg("h"), py::arg("mean"), py::arg("peak"),
               py::arg("threads"));
    module.def("glu_score_bwd", &glu_score_bwd, "See glu_score.h. An address of 0: there is none.", py::arg("type"),
               py::arg("act"), py::arg("tokens"), py::arg("neurons"), py::arg("requests"), py::arg("offsets"),
               py::arg("mask"), py::arg("dh"), py::arg("gate"), py::arg("up"), py::arg("dgate"), py::arg("dup"),
               py::arg("path"), py::arg("threads"));
    module.def("gram_norms", &gram_norms, "Norms from Gram matrices. See column_grad_norm.h.", py::arg("requests"),
               py::arg("h"), py::arg("stride"), py::arg("type"), py::arg("neurons"), py::arg("threads"));
    module.def("column_norms", &column_norms, "Norms of a product's columns. See column_grad_norm.h.",
               py::arg("product"), py::arg("rows"), py::arg("columns"), py::arg("norms"), py::arg("threads"));
}
