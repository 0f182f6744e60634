// The best k of L x D scores under constraints. Framework free: pointers and sizes only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pke_fast {

struct HotspotQuery {
    const float* scores;     // [layers, neurons], row-major
    std::size_t layers;      // L
    std::size_t neurons;     // D, of one layer
    std::size_t k;           // how many to choose, at most; 0 .. L * D
    std::size_t first;       // the window: layers first .. end - 1
    std::size_t end;         //
    std::size_t layer_cap;   // most of one layer; 0: no cap
    const uint8_t* exclude;  // [layers, neurons], nonzero: leave alone; null: none
    float minimum;           // scores below are not chosen, nor NaN; -inf: no minimum
};

struct HotspotCounts {
    std::size_t chosen;  // at most k; fewer where the constraints leave fewer
    std::size_t nans;    // NaN scores inside the window, excluded ones too
};

// Chooses the greatest scores; ties go to the lowest layer, then to the lowest neuron. -0 equals +0; a NaN comes after
// everything, -inf included. The same input gives the same output on every machine.
//
// Writes layer_ptr [layers + 1] and, in chosen_neurons (room for k), the neurons of layer l in ascending order at
// layer_ptr[l] .. layer_ptr[l + 1] - 1. Memory: O(k). Throws std::bad_alloc.
HotspotCounts select_hotspots(const HotspotQuery& query, int64_t* layer_ptr, int64_t* chosen_neurons);

}  // namespace pke_fast
