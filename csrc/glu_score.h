// act(gate) * up with statistics of every neuron by request, and its backward with the activation path. Framework free.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "elements.h"

namespace pke_fast {

// T tokens, D neurons, R requests; request r owns the tokens offsets[r] .. offsets[r + 1] - 1, which ascend within 0 ..
// T.
struct GluShape {
    Dtype type;  // of all [T, D]
    Activation act;
    int64_t tokens, neurons, requests;
    const int64_t* offsets;  // [R + 1]
    const uint8_t* mask;     // [T], zero: the token counts for nothing in what is summed by request; null: all count
};

// [T, D]: the elements of a row are neighbours, the rows lie `stride` elements apart. A null pointer: there is none.
struct Matrix {
    const void* data;
    int64_t stride;
};

struct OutputMatrix {
    void* data;
    int64_t stride;
};

// h = act(gate) * up, or act(gate) without an up. By request, from h in fp32: mean and maximum of |h| [R, D], 0 for a
// request where no token counts. Sums are in fp32, over at most 64 tokens and then over those sums, in order: the same
// input gives the same bits on any number of threads. Throws std::bad_alloc.
void glu_score_fwd(const GluShape& shape, Matrix gate, Matrix up, OutputMatrix h, float* mean, float* peak,
                   std::size_t threads);

// From dL/dh: dgate and dup (without an up there is none); by request, the path sum_t |h * dh| [R, D].
void glu_score_bwd(const GluShape& shape, Matrix dh, Matrix gate, Matrix up, OutputMatrix dgate, OutputMatrix dup,
                   float* path, std::size_t threads);

}  // namespace pke_fast
