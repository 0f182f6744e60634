// The best k of L x D scores under constraints, for R rows of them. Framework free: pointers and sizes only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace pke_fast {

struct HotspotQuery {
    const void* scores;      // [rows, layers, neurons], row-major
    std::size_t rows;        // R, each a selection by itself
    std::size_t layers;      // L
    std::size_t neurons;     // D, of one layer
    std::size_t k;           // how many to choose of a row, at most; 0 .. L * D
    std::size_t first;       // the window: layers first .. end - 1
    std::size_t end;         //
    std::size_t layer_cap;   // most of one layer; 0: no cap
    const uint8_t* exclude;  // [rows, layers, neurons], nonzero: leave alone; null: none
    float minimum;           // scores below are not chosen, nor NaN; -inf: no minimum
};

struct HotspotResult {
    int64_t* layer_ptr;   // [rows, layers + 1]
    int64_t* neurons;     // room for rows * k
    int64_t* nan_counts;  // [rows], NaN scores inside the window, excluded ones too
};

// Chooses the greatest scores of every row; ties go to the lowest layer, then to the lowest neuron. -0 equals +0; a NaN
// comes after everything, -inf included. The same input gives the same output on every machine.
//
// Layer l of row r has the neurons from layer_ptr[r][l] to layer_ptr[r][l + 1] - 1, in ascending order; the rows lie
// one behind the other. So the last pointer is how many were chosen. Fewer than k a row where the constraints leave
// fewer.

// On the calling thread; the scores are fp32. Memory: O(k). Throws std::bad_alloc.
void select_hotspots(const HotspotQuery& query, const HotspotResult& result);

#ifdef PKE_FAST_CUDA

// The bytes of device memory that select_hotspots_cuda needs for a query of these sizes. Throws std::invalid_argument
// where they are beyond what the kernels can count: 2^32 scores a row, 2^31 tiles.
std::size_t hotspot_scratch_size(const HotspotQuery& query);

// On the current device; all pointers are device memory. Puts the work on `stream` and returns without waiting for it.
// The scratch needs an alignment of 16 and no content. Throws std::runtime_error with CUDA's own text.
void select_hotspots_cuda(const HotspotQuery& query, Dtype format, const HotspotResult& result, void* scratch,
                          void* stream);
#endif

}  // namespace pke_fast
