#include "column_grad_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "lanes.h"
#include "parallel.h"
#include "widest.h"

namespace pke_fast {
namespace {

constexpr int64_t kRows = 6;         // tokens of a register tile: 6 x 4 of 32 registers are sums
constexpr std::size_t kMost = 4;     // Lanes of a register tile
constexpr int64_t kAlone = 1 << 21;  // multiplications for each thread: some 40 us, twice what starting one takes

// Adds to sums, for the tokens t .. t + rows - 1, h_t * (2 * sum over s < t of K[t, s] h_s, and K[t, s] h_s within
// these rows): all that K's rows t .. t + rows - 1 and, by symmetry, the same columns above them contribute. gram: row
// t of K; h: [tokens, vectors * kLane].
template <int64_t rows, std::size_t vectors>
PKE_FAST_INLINE void add_rows(const float* gram, int64_t tokens, const float* h, int64_t t, Lanes* sums) {
    constexpr std::size_t width = vectors * kLane;
    Lanes products[rows][vectors] = {};
    const auto add = [&](int64_t s) {
        for (int64_t i = 0; i < rows; ++i) {
            for (std::size_t v = 0; v < vectors; ++v)
                products[i][v] += gram[i * tokens + s] * lanes_at(h + s * width + v * kLane);
        }
    };
    for (int64_t s = 0; s < t; ++s) add(s);
    for (int64_t i = 0; i < rows; ++i) {
        for (std::size_t v = 0; v < vectors; ++v) products[i][v] += products[i][v];
    }
    for (int64_t s = t; s < t + rows; ++s) add(s);
    for (int64_t i = 0; i < rows; ++i) {
        for (std::size_t v = 0; v < vectors; ++v) sums[v] += products[i][v] * lanes_at(h + (t + i) * width + v * kLane);
    }
}

// forms [vectors * kLane] = h_i^T K h_i of so many neurons; h: [tokens, vectors * kLane].
template <std::size_t vectors>
PKE_FAST_INLINE void quadratic_forms(const float* gram, int64_t tokens, const float* h, float* forms) {
    Lanes sums[vectors] = {};
    int64_t t = 0;
    for (; t + kRows <= tokens; t += kRows) add_rows<kRows, vectors>(gram + t * tokens, tokens, h, t, sums);
    switch (tokens - t) {
        case 5:
            add_rows<5, vectors>(gram + t * tokens, tokens, h, t, sums);
            break;
        case 4:
            add_rows<4, vectors>(gram + t * tokens, tokens, h, t, sums);
            break;
        case 3:
            add_rows<3, vectors>(gram + t * tokens, tokens, h, t, sums);
            break;
        case 2:
            add_rows<2, vectors>(gram + t * tokens, tokens, h, t, sums);
            break;
        case 1:
            add_rows<1, vectors>(gram + t * tokens, tokens, h, t, sums);
            break;
    }
    for (std::size_t v = 0; v < vectors; ++v) lanes_at(forms + v * kLane) = sums[v];
}

PKE_FAST_WIDEST void quadratic_forms_wide(const float* gram, int64_t tokens, const float* h, float* forms) {
    quadratic_forms<kMost>(gram, tokens, h, forms);
}

PKE_FAST_WIDEST void quadratic_forms_narrow(const float* gram, int64_t tokens, const float* h, float* forms) {
    quadratic_forms<1>(gram, tokens, h, forms);
}

template <typename T>
PKE_FAST_INLINE void copy(const void* from, int64_t stride, int64_t rows, int64_t columns, float* into, int64_t width) {
    for (int64_t t = 0; t < rows; ++t) {
        const T* row = static_cast<const T*>(from) + t * stride;
        for (int64_t i = 0; i < columns; ++i) into[t * width + i] = widen(row[i]);
        for (int64_t i = columns; i < width; ++i) into[t * width + i] = 0.0f;
    }
}

PKE_FAST_WIDEST void copy_fp32(const void* from, int64_t stride, int64_t rows, int64_t columns, float* into,
                               int64_t width) {
    copy<float>(from, stride, rows, columns, into, width);
}

PKE_FAST_WIDEST void copy_bf16(const void* from, int64_t stride, int64_t rows, int64_t columns, float* into,
                               int64_t width) {
    copy<BFloat16>(from, stride, rows, columns, into, width);
}

PKE_FAST_WIDEST void copy_fp16(const void* from, int64_t stride, int64_t rows, int64_t columns, float* into,
                               int64_t width) {
    copy<Float16>(from, stride, rows, columns, into, width);
}

// Sums of squares of a dense matrix's columns first .. first + width - 1.
PKE_FAST_WIDEST void add_squares(const float* product, int64_t rows, int64_t columns, int64_t width,
                                 float* __restrict sums) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < width; ++i) sums[i] += product[r * columns + i] * product[r * columns + i];
    }
}

float root(float square) { return square < 0.0f ? 0.0f : std::sqrt(square); }

}  // namespace

void gram_norms(const GramRequest* requests, std::size_t count, const void* h, int64_t stride, Dtype dtype,
                int64_t neurons, std::size_t threads) {
    const bool wide = widest_bytes() == 64;  // AVX-512 has 32 registers of a Lanes, AVX2 only 16 of a half
    const auto forms_of = wide ? quadratic_forms_wide : quadratic_forms_narrow;
    const int64_t width = static_cast<int64_t>(wide ? kMost * kLane : kLane);
    const auto copy = dtype == Dtype::fp32 ? copy_fp32 : dtype == Dtype::bf16 ? copy_bf16 : copy_fp16;
    const int64_t size = dtype == Dtype::fp32 ? 4 : 2;
    const int64_t blocks = (neurons + width - 1) / width;
    int64_t longest = 0, multiplications = 0;
    for (std::size_t r = 0; r < count; ++r) {
        longest = std::max(longest, requests[r].tokens);
        multiplications += requests[r].tokens * requests[r].tokens / 2 * neurons;
    }
    threads = std::min(threads, static_cast<std::size_t>(multiplications / kAlone + 1));

    // Each worker has a copy of a block of h, so what parallel_for hands out are workers, and they take the blocks.
    const std::unique_ptr<float[]> copies(new float[threads * longest * width]);
    std::atomic<std::size_t> next{0};
    parallel_for(threads, threads, [&](std::size_t worker) {
        float* part = copies.get() + static_cast<int64_t>(worker) * longest * width;
        float forms[kMost * kLane];
        for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count * blocks;) {
            const GramRequest& request = requests[task / blocks];
            const int64_t first = static_cast<int64_t>(task % blocks) * width;
            const int64_t present = std::min(width, neurons - first);
            const auto* from = static_cast<const char*>(h) + (request.first * stride + first) * size;
            copy(from, stride, request.tokens, present, part, width);
            forms_of(request.gram, request.tokens, part, forms);
            std::transform(forms, forms + present, request.norms + first, root);
        }
    });
}

void column_norms(const float* product, int64_t rows, int64_t columns, float* norms, std::size_t threads) {
    constexpr int64_t kColumns = 256;
    threads = std::min(threads, static_cast<std::size_t>(rows * columns / (1 << 18) + 1));
    parallel_for((columns + kColumns - 1) / kColumns, threads, [&](std::size_t block) {
        const int64_t first = static_cast<int64_t>(block) * kColumns;
        const int64_t width = std::min(kColumns, columns - first);
        float sums[kColumns] = {};
        for (int64_t r = 0; r < rows; r += 64) {  // partial sums, whose rounding errors stay small
            float part[kColumns] = {};
            add_squares(product + r * columns + first, std::min<int64_t>(64, rows - r), columns, width, part);
            for (int64_t i = 0; i < width; ++i) sums[i] += part[i];
        }
        std::transform(sums, sums + width, norms + first, root);
    });
}

}  // namespace pke_fast
