// Column norms of the down projection's gradient, from products that the caller made. Framework free.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements.h"

namespace pke_fast {

// One request: its tokens first .. first + tokens - 1, its Gram matrix K = G G^T [tokens, tokens], where its norms go.
struct GramRequest {
    int64_t first, tokens;
    const float* gram;
    float* norms;  // [D]
};

// norms[i] = sqrt(h_i^T K h_i), where rounding makes that negative 0, for every request and each of D neurons. h [T,
// D]: the elements of a row are neighbours, the rows lie `stride` elements apart. Only the lower half of K is read, but
// for blocks of six along the diagonal. The same input gives the same bits on any number of threads. Throws
// std::bad_alloc.
void gram_norms(const GramRequest* requests, std::size_t count, const void* h, int64_t stride, Dtype dtype,
                int64_t neurons, std::size_t threads);

// norms[i] = sqrt(sum of squares of column i) of a dense product [rows, columns]. On any number of threads the same
// bits.
void column_norms(const float* product, int64_t rows, int64_t columns, float* norms, std::size_t threads);

}  // namespace pke_fast
