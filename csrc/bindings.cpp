// The Python module pke_fast._native. Tensors come as addresses and sizes: the Python side has checked them and holds
// them while the call runs. The GIL is released. This is the only file that may include pybind11: its headers lie
// elsewhere at every isolated build, and what includes them is compiled again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "column_grad_norm.h"
#include "glu_score.h"
#include "select_hotspots.h"
#include "sparse_columns.h"

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
    module.def("hotspot_scratch_size", &pke_fast::hotspot_scratch_size, "In bytes.", py::arg("query"));
    module.def(
        "select_hotspots_cuda",
        [](const pke_fast::HotspotQuery& asked, pke_fast::Dtype format, const pke_fast::HotspotResult& to,
           std::uintptr_t scratch, std::uintptr_t stream) {
            pke_fast::select_hotspots_cuda(asked, format, to, pointer<void>(scratch), pointer<void>(stream));
        },
        "On the current CUDA device; doesn't wait for the result. See select_hotspots.h.",
        py::call_guard<py::gil_scoped_release>(), py::arg("query"), py::arg("format"), py::arg("result"),
        py::arg("scratch"), py::arg("stream"));
#endif
}

const char* check_neurons(std::uintptr_t neurons, std::size_t n, std::int64_t count) {
    switch (pke_fast::check_neurons(pointer<const std::int64_t>(neurons), n, count)) {
        case pke_fast::NeuronFault::out_of_range:
            return "one is out of range";
        case pke_fast::NeuronFault::twice:
            return "one is there twice";
        default:
            return nullptr;
    }
}

void sparse_column_grad(std::uintptr_t grad_out, std::ptrdiff_t grad_out_stride, std::uintptr_t h,
                        std::ptrdiff_t h_stride, pke_fast::Dtype dtype, std::size_t tokens, std::size_t hidden,
                        std::size_t n, std::uintptr_t into, std::ptrdiff_t into_stride, std::size_t threads) {
    const py::gil_scoped_release released;
    pke_fast::sparse_column_grad({pointer<const void>(grad_out), grad_out_stride}, {pointer<const void>(h), h_stride},
                                 dtype, tokens, hidden, n, pointer<float>(into), into_stride, threads);
}

pke_fast::Columns columns(std::uintptr_t weight, pke_fast::Dtype dtype, std::size_t hidden,
                          std::ptrdiff_t neuron_stride, std::ptrdiff_t hidden_stride, std::uintptr_t neurons,
                          std::size_t n) {
    return {
        pointer<void>(weight), dtype, hidden, neuron_stride, hidden_stride, pointer<const std::int64_t>(neurons), n};
}

void sparse_column_update(const pke_fast::Columns& columns, std::uintptr_t old, std::uintptr_t master,
                          std::uintptr_t moment1, std::uintptr_t moment2, std::uintptr_t grad, std::int64_t step,
                          double lr, double beta1, double beta2, double eps, double weight_decay, double bound,
                          std::size_t threads) {
    const py::gil_scoped_release released;
    pke_fast::sparse_column_update(
        columns,
        {pointer<const float>(old), pointer<float>(master), pointer<float>(moment1), pointer<float>(moment2),
         pointer<const float>(grad), lr, beta1, beta2, eps, weight_decay, bound, step},
        threads);
}

void write_columns(const pke_fast::Columns& columns, std::uintptr_t values, std::ptrdiff_t value_stride,
                   bool values_are_fp32, std::size_t threads) {
    const py::gil_scoped_release released;
    pke_fast::write_columns(columns, pointer<const void>(values), value_stride, values_are_fp32, threads);
}

void bind_sparse_columns(py::module_& module) {
    py::class_<pke_fast::Columns>(module, "Columns", "Selected neurons of a weight. See sparse_columns.h.")
        .def(py::init(&columns), py::arg("weight"), py::arg("dtype"), py::arg("hidden"), py::arg("neuron_stride"),
             py::arg("hidden_stride"), py::arg("neurons"), py::arg("n"));
    module.def("check_neurons", &check_neurons, "What is wrong with them, or None. See sparse_columns.h.",
               py::arg("neurons"), py::arg("n"), py::arg("count"));
    module.def("sparse_column_grad", &sparse_column_grad, "See sparse_columns.h.", py::arg("grad_out"),
               py::arg("grad_out_stride"), py::arg("h"), py::arg("h_stride"), py::arg("dtype"), py::arg("tokens"),
               py::arg("hidden"), py::arg("n"), py::arg("into"), py::arg("into_stride"), py::arg("threads"));
    module.def("sparse_column_update", &sparse_column_update, "See sparse_columns.h.", py::arg("columns"),
               py::arg("old"), py::arg("master"), py::arg("moment1"), py::arg("moment2"), py::arg("grad"),
               py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
               py::arg("weight_decay"), py::arg("bound"), py::arg("threads"));
    module.def("write_columns", &write_columns, "See sparse_columns.h.", py::arg("columns"), py::arg("values"),
               py::arg("value_stride"), py::arg("values_are_fp32"), py::arg("threads"));
}

pke_fast::GluShape glu_shape(pke_fast::Dtype type, int act, std::int64_t tokens, std::int64_t neurons,
                             std::int64_t requests, std::uintptr_t offsets, std::uintptr_t mask) {
    return {type,
            static_cast<pke_fast::Activation>(act),
            tokens,
            neurons,
            requests,
            pointer<const std::int64_t>(offsets),
            pointer<const std::uint8_t>(mask)};
}

// A tensor's address and the elements from one row to the next.
using Strided = std::pair<std::uintptr_t, std::int64_t>;

pke_fast::Matrix matrix(Strided tensor) { return {pointer<const void>(tensor.first), tensor.second}; }

pke_fast::OutputMatrix output(Strided tensor) { return {pointer<void>(tensor.first), tensor.second}; }

void glu_score_fwd(pke_fast::Dtype type, int act, std::int64_t tokens, std::int64_t neurons, std::int64_t requests,
                   std::uintptr_t offsets, std::uintptr_t mask, Strided gate, Strided up, Strided h,
                   std::uintptr_t mean, std::uintptr_t peak, std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::glu_score_fwd(glu_shape(type, act, tokens, neurons, requests, offsets, mask), matrix(gate), matrix(up),
                            output(h), pointer<float>(mean), pointer<float>(peak), threads);
}

void glu_score_bwd(pke_fast::Dtype type, int act, std::int64_t tokens, std::int64_t neurons, std::int64_t requests,
                   std::uintptr_t offsets, std::uintptr_t mask, Strided dh, Strided gate, Strided up, Strided dgate,
                   Strided dup, std::uintptr_t path, std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::glu_score_bwd(glu_shape(type, act, tokens, neurons, requests, offsets, mask), matrix(dh), matrix(gate),
                            matrix(up), output(dgate), output(dup), pointer<float>(path), threads);
}

// requests: (first, tokens, address of the Gram matrix, address of the norms) each.
void gram_norms(const std::vector<std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>>& requests,
                std::uintptr_t h, std::int64_t stride, pke_fast::Dtype type, std::int64_t neurons,
                std::size_t threads) {
    py::gil_scoped_release released;
    std::vector<pke_fast::GramRequest> grams;
    for (const auto& [first, tokens, gram, norms] : requests)
        grams.push_back({first, tokens, pointer<const float>(gram), pointer<float>(norms)});
    pke_fast::gram_norms(grams.data(), grams.size(), pointer<const void>(h), stride, type, neurons, threads);
}

void column_norms(std::uintptr_t product, std::int64_t rows, std::int64_t columns, std::uintptr_t norms,
                  std::size_t threads) {
    py::gil_scoped_release released;
    pke_fast::column_norms(pointer<const float>(product), rows, columns, pointer<float>(norms), threads);
}

void bind_glu_score(py::module_& module) {
    module.def("glu_score_fwd", &glu_score_fwd, "See glu_score.h. An address of 0: there is none.", py::arg("type"),
               py::arg("act"), py::arg("tokens"), py::arg("neurons"), py::arg("requests"), py::arg("offsets"),
               py::arg("mask"), py::arg("gate"), py::arg("up"), py::arg("h"), py::arg("mean"), py::arg("peak"),
               py::arg("threads"));
    module.def("glu_score_bwd", &glu_score_bwd, "See glu_score.h. An address of 0: there is none.", py::arg("type"),
               py::arg("act"), py::arg("tokens"), py::arg("neurons"), py::arg("requests"), py::arg("offsets"),
               py::arg("mask"), py::arg("dh"), py::arg("gate"), py::arg("up"), py::arg("dgate"), py::arg("dup"),
               py::arg("path"), py::arg("threads"));
}

void bind_column_grad_norm(py::module_& module) {
    module.def("gram_norms", &gram_norms, "Norms from Gram matrices. See column_grad_norm.h.", py::arg("requests"),
               py::arg("h"), py::arg("stride"), py::arg("type"), py::arg("neurons"), py::arg("threads"));
    module.def("column_norms", &column_norms, "Norms of a product's columns. See column_grad_norm.h.",
               py::arg("product"), py::arg("rows"), py::arg("columns"), py::arg("norms"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "C++ and CUDA parts of pke_fast; called by pke_fast.kernels only.";
    py::list architectures;  // what there is machine code for; none where it was built without CUDA
#ifdef PKE_FAST_CUDA
    for (int number : {PKE_FAST_CUDA}) architectures.append("sm_" + std::to_string(number));
#endif
    module.attr("cuda_architectures") = architectures;
    py::enum_<pke_fast::Dtype>(module, "Dtype")
        .value("fp32", pke_fast::Dtype::fp32)
        .value("bf16", pke_fast::Dtype::bf16)
        .value("fp16", pke_fast::Dtype::fp16);
    bind_glu_score(module);
    bind_column_grad_norm(module);
    bind_select_hotspots(module);
    bind_sparse_columns(module);
}
