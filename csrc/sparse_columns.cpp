#include "sparse_columns.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"
#include "widest.h"

namespace pke_fast {
namespace {

// Adam's numbers in fp32, as torch's kernels take them.
struct Rates {
    float beta1, rest1;  // rest: 1 - beta, rounded from fp64
    float beta2, rest2;
    float by_bias2, eps, scale;  // 1 / (1 - beta2^step); -lr / (1 - beta1^step)
    float decay, bound;

    explicit Rates(const AdamStep& adam)
        : beta1(static_cast<float>(adam.beta1)),
          rest1(static_cast<float>(1 - adam.beta1)),
          beta2(static_cast<float>(adam.beta2)),
          rest2(static_cast<float>(1 - adam.beta2)),
          by_bias2(static_cast<float>(1 / (1 - std::pow(adam.beta2, static_cast<double>(adam.step))))),
          eps(static_cast<float>(adam.eps)),
          scale(static_cast<float>(-adam.lr / (1 - std::pow(adam.beta1, static_cast<double>(adam.step))))),
          decay(static_cast<float>(adam.lr * adam.weight_decay)),
          bound(static_cast<float>(adam.bound)) {}
};

// `count` elements of one neuron. With `held`, the decay towards `old` and the bound; comparisons keep a NaN.
template <bool held>
PKE_FAST_INLINE void adam_elements(const Rates& rates, const float* __restrict old, float* __restrict master,
                                   float* __restrict moment1, float* __restrict moment2, const float* __restrict grad,
                                   std::size_t count) {
    const Rates r = rates;  // by value: what is stored below can't change it
    for (std::size_t i = 0; i < count; ++i) {
        const float g = grad[i];
        // As torch's lerp: exact at both ends.
        const float first = r.rest1 < 0.5f ? moment1[i] + r.rest1 * (g - moment1[i]) : g - (g - moment1[i]) * r.beta1;
        const float second = r.beta2 * moment2[i] + r.rest2 * g * g;
        moment1[i] = first;
        moment2[i] = second;
        float value = master[i];
        if (held) value -= r.decay * (value - old[i]);
        value += r.scale * first / (std::sqrt(second * r.by_bias2) + r.eps);
        if (held) {
            const float lowest = old[i] - r.bound, highest = old[i] + r.bound;
            value = value < lowest ? lowest : value;
            value = value > highest ? highest : value;
        }
        master[i] = value;
    }
}

PKE_FAST_WIDEST void adam_free(const Rates& rates, const AdamStep& a, std::size_t at, std::size_t count) {
    adam_elements<false>(rates, nullptr, a.master + at, a.moment1 + at, a.moment2 + at, a.grad + at, count);
}

PKE_FAST_WIDEST void adam_held(const Rates& rates, const AdamStep& a, std::size_t at, std::size_t count) {
    adam_elements<true>(rates, a.old + at, a.master + at, a.moment1 + at, a.moment2 + at, a.grad + at, count);
}

PKE_FAST_WIDEST void round_to_bf16(const float* __restrict values, uint16_t* __restrict out, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = to_bf16(values[i]);
}

PKE_FAST_WIDEST void round_to_fp16(const float* __restrict values, uint16_t* __restrict out, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) out[i] = to_fp16(values[i]);
}

inline void round_to(Dtype, const float* values, uint32_t* out, std::size_t count) {
    std::memcpy(out, values, count * sizeof *out);
}

inline void round_to(Dtype dtype, const float* values, uint16_t* out, std::size_t count) {
    (dtype == Dtype::bf16 ? round_to_bf16 : round_to_fp16)(values, out, count);
}

constexpr std::size_t kAhead = 128;             // elements of the weight that are prefetched
constexpr std::size_t kTileBytes = 1 << 18;     // half of a small second-level cache
constexpr std::size_t kMostNeurons = 1024;      // of a tile, so that it has at least 64 elements of each
constexpr std::size_t kMostHidden = 256;        // elements of one neuron in a tile
constexpr std::size_t kWorthAThread = 1 << 15;  // elements: some 30 us of work, what it costs to start a thread

// Asks for an element that will be written; it may lie past the weight's end, where nothing happens.
template <typename Bits>
PKE_FAST_INLINE void prefetch_to_write(const Bits* row, std::ptrdiff_t offset) {
#if defined(__GNUC__)
    const std::uintptr_t element = reinterpret_cast<std::uintptr_t>(row) + offset * sizeof(Bits);
    __builtin_prefetch(reinterpret_cast<const void*>(element), 1, 3);
#else
    (void)row, (void)offset;
#endif
}

// A neuron's column touches a line and, in a large weight, a page of memory for each of its elements. So a tile takes a
// run of elements of many neurons, and then the weight is walked row by row: neighbours in a row share lines, lines of
// a row share pages, and the prefetch runs ahead of both.
//
// `source.rounded(i, x, count, out)` gives elements x .. x + count - 1 of neuron i in the weight's dtype.
template <typename Bits, typename Source>
void write_tiles(const Columns& c, const Source& source, std::size_t threads) {
    const std::size_t wide = std::min(c.n, kMostNeurons);
    const std::size_t deep = std::clamp<std::size_t>(kTileBytes / (sizeof(Bits) * wide) / 64 * 64, 64, kMostHidden);
    const std::size_t stride = deep + 64 / sizeof(Bits);  // an odd number of lines: a tile's column fills every set
    const std::size_t across = (c.n + wide - 1) / wide, down = (c.hidden + deep - 1) / deep;
    const std::size_t workers = std::min(threads, across * down);
    std::vector<Bits> tiles(workers * wide * stride);
    std::vector<std::ptrdiff_t> offsets(workers * (wide + kAhead));
    std::atomic<std::size_t> next{0};

    parallel_for(workers, workers, [&](std::size_t worker) {
        Bits* tile = tiles.data() + worker * wide * stride;
        std::ptrdiff_t* to = offsets.data() + worker * (wide + kAhead);
        for (std::size_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < across * down;) {
            const std::size_t i0 = block / down * wide, x0 = block % down * deep;
            const std::size_t neurons = std::min(wide, c.n - i0), count = std::min(deep, c.hidden - x0);
            for (std::size_t j = 0; j < neurons + kAhead; ++j) {  // past the end: the same neurons in the rows below
                to[j] = static_cast<std::ptrdiff_t>(c.neurons[i0 + j % neurons]) * c.neuron_stride +
                        static_cast<std::ptrdiff_t>(j / neurons) * c.hidden_stride;
            }
            for (std::size_t j = 0; j < neurons; ++j) source.rounded(i0 + j, x0, count, tile + j * stride);
            for (std::size_t x = 0; x < count; ++x) {
                Bits* row = static_cast<Bits*>(c.data) + static_cast<std::ptrdiff_t>(x0 + x) * c.hidden_stride;
                for (std::size_t j = 0; j < neurons; ++j) {
                    prefetch_to_write(row, to[j + kAhead]);
                    row[to[j]] = tile[j * stride + x];
                }
            }
        }
    });
}

// Neurons whose elements are neighbours: from the source straight into the weight.
template <typename Bits, typename Source>
void write_dense(const Columns& c, const Source& source, std::size_t threads) {
    constexpr std::size_t kRun = 1 << 12;  // elements of a block: 16 KB of fp32 each of what is read
    const std::size_t runs = (c.hidden + kRun - 1) / kRun;
    const std::size_t together = std::max<std::size_t>(1, kRun / c.hidden);  // short neurons in one block
    const std::size_t groups = (c.n + together - 1) / together;
    parallel_for(groups * runs, threads, [&](std::size_t block) {
        const std::size_t x = block % runs * kRun, count = std::min(kRun, c.hidden - x);
        const std::size_t i0 = block / runs * together;
        for (std::size_t i = i0; i < std::min(c.n, i0 + together); ++i) {
            source.rounded(i, x, count, static_cast<Bits*>(c.data) + c.neurons[i] * c.neuron_stride + x);
        }
    });
}

template <typename Source>
void write_from(const Columns& c, const Source& source, std::size_t threads) {
    if (c.n == 0 || c.hidden == 0) return;
    threads = std::min(threads, 1 + c.n * c.hidden / kWorthAThread);
    const bool dense = c.hidden_stride == 1 || c.hidden == 1;
    if (c.dtype == Dtype::fp32) {
        dense ? write_dense<uint32_t>(c, source, threads) : write_tiles<uint32_t>(c, source, threads);
    } else {
        dense ? write_dense<uint16_t>(c, source, threads) : write_tiles<uint16_t>(c, source, threads);
    }
}

struct FromAdam {
    const AdamStep& adam;
    Rates rates;
    bool held;
    Dtype dtype;
    std::size_t hidden;

    template <typename Bits>
    void rounded(std::size_t i, std::size_t x, std::size_t count, Bits* out) const {
        const std::size_t at = i * hidden + x;
        (held ? adam_held : adam_free)(rates, adam, at, count);
        round_to(dtype, adam.master + at, out, count);
    }
};

struct FromFp32 {
    const float* values;
    std::ptrdiff_t stride;
    Dtype dtype;

    template <typename Bits>
    void rounded(std::size_t i, std::size_t x, std::size_t count, Bits* out) const {
        round_to(dtype, values + static_cast<std::ptrdiff_t>(i) * stride + x, out, count);
    }
};

struct FromBits {
    const void* values;
    std::ptrdiff_t stride;

    template <typename Bits>
    void rounded(std::size_t i, std::size_t x, std::size_t count, Bits* out) const {
        const Bits* from = static_cast<const Bits*>(values) + static_cast<std::ptrdiff_t>(i) * stride + x;
        std::memcpy(out, from, count * sizeof *out);
    }
};

}  // namespace

NeuronFault check_neurons(const int64_t* neurons, std::size_t n, int64_t count) {
    bool ascending = true;
    for (std::size_t i = 0; i < n; ++i) {
        if (neurons[i] < 0 || neurons[i] >= count) return NeuronFault::out_of_range;
        ascending = ascending && (i == 0 || neurons[i - 1] < neurons[i]);
    }
    if (ascending) return NeuronFault::none;
    std::vector<int64_t> sorted(neurons, neurons + n);
    std::sort(sorted.begin(), sorted.end());
    const bool twice = std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
    return twice ? NeuronFault::twice : NeuronFault::none;
}

void sparse_column_update(const Columns& columns, const AdamStep& adam, std::size_t threads) {
    const bool held = adam.weight_decay != 0 || adam.bound < std::numeric_limits<double>::infinity();
    write_from(columns, FromAdam{adam, Rates(adam), held, columns.dtype, columns.hidden}, threads);
}

void write_columns(const Columns& columns, const void* values, std::ptrdiff_t value_stride, bool values_are_fp32,
                   std::size_t threads) {
    if (values_are_fp32) {
        write_from(columns, FromFp32{static_cast<const float*>(values), value_stride, columns.dtype}, threads);
    } else {
        write_from(columns, FromBits{values, value_stride}, threads);
    }
}

}  // namespace pke_fast
