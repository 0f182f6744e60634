// A matrix product with few rows, h^T G. Its registers hold a tile of the result while tokens go by; the operands pass
// through small fp32 copies, so halves are widened once and rows a power of two apart don't evict each other.
#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"
#include "sparse_columns.h"
#include "widest.h"

namespace pke_fast {
namespace {

// A register's worth of floats. Wider than the processor's, compilers keep them in memory: 16 B is SSE's and NEON's,
// 32 B AVX2's, 64 B AVX-512's.
template <std::size_t bytes>
struct Register {
#if defined(__GNUC__)
    typedef float Floats __attribute__((vector_size(bytes), aligned(4), may_alias));
#else
    struct Floats {
        float at[bytes / sizeof(float)];
        Floats& operator+=(const Floats& other) {
            for (std::size_t i = 0; i < bytes / sizeof(float); ++i) at[i] += other.at[i];
            return *this;
        }
        friend Floats operator*(float factor, const Floats& floats) {
            Floats product;
            for (std::size_t i = 0; i < bytes / sizeof(float); ++i) product.at[i] = factor * floats.at[i];
            return product;
        }
    };
#endif
};

constexpr std::size_t kNeurons = 6;   // of a register tile: with 2 vectors 12 of 16 registers are sums, with 4
                                      // 24 of AVX-512's 32
constexpr std::size_t kTokens = 128;  // whose panel of G, up to 32 KB, stays in the first-level cache
constexpr std::size_t kWorthAThread = 1 << 24;  // products, some 0.2 ms; at a tenth of it a second thread cost time
constexpr std::size_t kSlabBytes = 1 << 19;     // of h in fp32: stays in the second-level cache

// Adds to a [kNeurons, vectors * lanes] tile of the result the products of `tokens` tokens.
template <std::size_t bytes, std::size_t vectors>
PKE_FAST_INLINE void multiply(const float* __restrict h, const float* __restrict g, std::ptrdiff_t g_stride,
                              std::size_t tokens, float* __restrict into, std::ptrdiff_t stride, std::size_t rows,
                              std::size_t columns) {
    using Lanes = typename Register<bytes>::Floats;
    constexpr std::size_t lanes = bytes / sizeof(float);
    Lanes sums[kNeurons][vectors] = {};
    for (std::size_t t = 0; t < tokens; ++t) {
        Lanes b_g[vectors];
        for (std::size_t v = 0; v < vectors; ++v) b_g[v] = *reinterpret_cast<const Lanes*>(g + v * lanes);
        for (std::size_t i = 0; i < kNeurons; ++i) {
            for (std::size_t v = 0; v < vectors; ++v) sums[i][v] += h[i] * b_g[v];
        }
        h += kNeurons;
        g += g_stride;
    }
    if (rows == kNeurons && columns == vectors * lanes) {
        for (std::size_t i = 0; i < kNeurons; ++i) {
            for (std::size_t v = 0; v < vectors; ++v) {
                *reinterpret_cast<Lanes*>(into + static_cast<std::ptrdiff_t>(i) * stride + v * lanes) += sums[i][v];
            }
        }
        return;
    }
    float edge[kNeurons][vectors * lanes];
    for (std::size_t i = 0; i < kNeurons; ++i) {
        for (std::size_t v = 0; v < vectors; ++v) *reinterpret_cast<Lanes*>(&edge[i][v * lanes]) = sums[i][v];
    }
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t x = 0; x < columns; ++x) into[static_cast<std::ptrdiff_t>(i) * stride + x] += edge[i][x];
    }
}

using Multiply = void (*)(const float*, const float*, std::ptrdiff_t, std::size_t, float*, std::ptrdiff_t, std::size_t,
                          std::size_t);

PKE_FAST_WIDEST void multiply_64(const float* h, const float* g, std::ptrdiff_t g_stride, std::size_t tokens,
                                 float* into, std::ptrdiff_t stride, std::size_t rows, std::size_t columns) {
    multiply<64, 4>(h, g, g_stride, tokens, into, stride, rows, columns);
}

PKE_FAST_WIDEST void multiply_32(const float* h, const float* g, std::ptrdiff_t g_stride, std::size_t tokens,
                                 float* into, std::ptrdiff_t stride, std::size_t rows, std::size_t columns) {
    multiply<32, 2>(h, g, g_stride, tokens, into, stride, rows, columns);
}

void multiply_16(const float* h, const float* g, std::ptrdiff_t g_stride, std::size_t tokens, float* into,
                 std::ptrdiff_t stride, std::size_t rows, std::size_t columns) {
    multiply<16, 2>(h, g, g_stride, tokens, into, stride, rows, columns);
}

PKE_FAST_WIDEST void widen_bf16(const uint16_t* __restrict in, float* __restrict out, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = from_bf16(in[i]);
}

PKE_FAST_WIDEST void widen_fp16(const uint16_t* __restrict in, float* __restrict out, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = from_fp16(in[i]);
}

// `count` elements of row t from element x on, in fp32, and zeros up to `padded`.
inline void widen(const Rows& rows, Dtype dtype, std::size_t t, std::size_t x, std::size_t count, std::size_t padded,
                  float* out) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * rows.stride + static_cast<std::ptrdiff_t>(x);
    if (dtype == Dtype::fp32) {
        std::memcpy(out, static_cast<const float*>(rows.data) + at, count * sizeof *out);
    } else {
        (dtype == Dtype::bf16 ? widen_bf16 : widen_fp16)(static_cast<const uint16_t*>(rows.data) + at, out, count);
    }
    std::fill(out + count, out + padded, 0.0f);
}

// The tokens first .. first + tokens - 1 of h as [n / kNeurons, tokens, kNeurons], the last neurons padded with zeros.
void pack_h(const Rows& h, Dtype dtype, std::size_t first, std::size_t tokens, std::size_t n, float* row, float* out) {
    const std::size_t padded = (n + kNeurons - 1) / kNeurons * kNeurons;
    for (std::size_t t = 0; t < tokens; ++t) {
        widen(h, dtype, first + t, 0, n, padded, row);
        for (std::size_t i = 0; i < padded; i += kNeurons) {
            float* to = out + i * tokens + t * kNeurons;
            for (std::size_t k = 0; k < kNeurons; ++k) to[k] = row[i + k];
        }
    }
}

}  // namespace

void sparse_column_grad(Rows grad_out, Rows h, Dtype dtype, std::size_t tokens, std::size_t hidden, std::size_t n,
                        float* into, std::ptrdiff_t into_stride, std::size_t threads) {
    if (tokens == 0 || hidden == 0 || n == 0) return;
    const std::size_t bytes = widest_bytes(), width = bytes == 64 ? 64 : bytes / 2;  // floats: 4 vectors, or 2
    const Multiply tile = bytes == 64 ? multiply_64 : bytes == 32 ? multiply_32 : multiply_16;
    const std::size_t padded = (n + kNeurons - 1) / kNeurons * kNeurons;
    const std::size_t slab = std::max(kTokens, kSlabBytes / (padded * sizeof(float)) / kTokens * kTokens);
    const std::size_t panels = (hidden + width - 1) / width;
    const std::size_t workers = std::min({threads, panels, 1 + tokens * n * hidden / kWorthAThread});
    std::vector<float> packed(padded * std::min(slab, tokens) + padded);
    std::vector<float> panel(workers * kTokens * width);

    for (std::size_t first = 0; first < tokens; first += slab) {
        const std::size_t last = std::min(tokens, first + slab);
        float* row = packed.data() + packed.size() - padded;
        for (std::size_t t = first; t < last; t += kTokens) {
            pack_h(h, dtype, t, std::min(kTokens, last - t), n, row, packed.data() + (t - first) * padded);
        }
        std::atomic<std::size_t> next{0};
        parallel_for(workers, workers, [&](std::size_t worker) {
            float* g = panel.data() + worker * kTokens * width;
            for (std::size_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < panels;) {
                const std::size_t x = block * width, columns = std::min(width, hidden - x);
                for (std::size_t t = first; t < last; t += kTokens) {
                    const std::size_t count = std::min(kTokens, last - t);
                    if (n <= kNeurons && dtype == Dtype::fp32 && columns == width) {  // used once: a copy wouldn't pay
                        const float* rows = static_cast<const float*>(grad_out.data) + x;
                        tile(packed.data() + (t - first) * padded,
                             rows + static_cast<std::ptrdiff_t>(t) * grad_out.stride, grad_out.stride, count, into + x,
                             into_stride, n, columns);
                        continue;
                    }
                    for (std::size_t k = 0; k < count; ++k) {
                        widen(grad_out, dtype, t + k, x, columns, width, g + k * width);
                    }
                    const float* some = packed.data() + (t - first) * padded;
                    for (std::size_t i = 0; i < n; i += kNeurons) {
                        tile(some + i * count, g, static_cast<std::ptrdiff_t>(width), count,
                             into + static_cast<std::ptrdiff_t>(i) * into_stride + x, into_stride,
                             std::min(kNeurons, n - i), columns);
                    }
                }
            }
        });
    }
}

}  // namespace pke_fast
