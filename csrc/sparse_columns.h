// Gradient, Adam and writes for selected neurons of one weight. Framework free: pointers and sizes only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace pke_fast {

// The selected neurons of a weight: element x of neuron i lies at data[neurons[i] * neuron_stride + x * hidden_stride].
// No two elements may share an address.
struct Columns {
    void* data;
    Dtype dtype;
    std::size_t hidden;            // d, elements of a neuron
    std::ptrdiff_t neuron_stride;  // in elements, as hidden_stride
    std::ptrdiff_t hidden_stride;
    const int64_t* neurons;  // [n], in range, each once; any order, ascending is faster
    std::size_t n;
};

// One step of Adam on fp32 [n, d], row-major, of which no two overlap.
struct AdamStep {
    const float* old;  // read only with a decay or a bound
    float* master;     // this and the moments change in place
    float* moment1;
    float* moment2;
    const float* grad;
    double lr, beta1, beta2, eps, weight_decay, bound;  // bound: infinity for none
    int64_t step;                                       // 1 for the first
};

enum class NeuronFault { none, out_of_range, twice };

// What is wrong with `neurons`, if anything: each has to lie within 0 .. count - 1 and to be there once. Throws
// std::bad_alloc (only where they don't ascend).
NeuronFault check_neurons(const int64_t* neurons, std::size_t n, int64_t count);

// Adam, then the master rounded to the weight's dtype into the live weight. The result doesn't depend on `threads`.
// Throws std::bad_alloc before anything has changed.
void sparse_column_update(const Columns& columns, const AdamStep& adam, std::size_t threads);

// Replaces the columns by values [n, d]: fp32 is rounded, otherwise they have the weight's dtype and keep every bit.
// `value_stride` is from one neuron's values to the next. Throws std::bad_alloc before anything has changed.
void write_columns(const Columns& columns, const void* values, std::ptrdiff_t value_stride, bool values_are_fp32,
                   std::size_t threads);

// A matrix [rows, columns] whose rows are dense and lie `stride` elements apart.
struct Rows {
    const void* data;
    std::ptrdiff_t stride;
};

// into [n, d] (rows `into_stride` apart) += h^T G, with h [tokens, n] and G [tokens, d] of one dtype; fp32 sums in an
// order that comes from the shape alone. Throws std::bad_alloc before anything has changed.
void sparse_column_grad(Rows grad_out, Rows h, Dtype dtype, std::size_t tokens, std::size_t hidden, std::size_t n,
                        float* into, std::ptrdiff_t into_stride, std::size_t threads);

}  // namespace pke_fast
