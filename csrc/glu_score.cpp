#include "glu_score.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "huge_pages.h"
#include "parallel.h"
#include "token_ranges.h"
#include "widest.h"

namespace pke_fast {
namespace {

constexpr int64_t kTokens = 64;  // longest range: its rounding errors stay small, its sums are a 64th of what is read
constexpr int64_t kNeurons = 2048;   // of a block: its sums stay in the first-level cache
constexpr int64_t kAlone = 1 << 17;  // elements for each thread: some 40 us of work, twice what starting one takes

// One range of tokens by one block of neurons. sums and peaks [neurons] belong to it alone.
struct Tile {
    TokenRange tokens;
    int64_t first, neurons;
    float* sums;
    float* peaks;
};

template <typename T>
PKE_FAST_INLINE const T* at(Matrix rows, int64_t token, int64_t neuron) {
    return static_cast<const T*>(rows.data) + token * rows.stride + neuron;
}

template <typename T>
PKE_FAST_INLINE T* at(OutputMatrix rows, int64_t token, int64_t neuron) {
    return static_cast<T*>(rows.data) + token * rows.stride + neuron;
}

template <typename T, typename Act, bool kGated>
PKE_FAST_INLINE void forward_row(const T* __restrict gate, const T* __restrict up, T* __restrict h,
                                 float* __restrict sums, float* __restrict peaks, int64_t neurons) {
    for (int64_t i = 0; i < neurons; ++i) {
        float value = Act::value(widen(gate[i]));
        if (kGated) value *= widen(up[i]);
        narrow(value, h[i]);
        const float size = std::fabs(value);
        sums[i] += size;
        peaks[i] = size > peaks[i] ? size : peaks[i];
    }
}

template <typename T, typename Act, bool kGated>
PKE_FAST_INLINE void backward_row(const T* __restrict dh, const T* __restrict gate, const T* __restrict up,
                                  T* __restrict dgate, T* __restrict dup, float* __restrict sums, int64_t neurons) {
    for (int64_t i = 0; i < neurons; ++i) {
        const float d = widen(dh[i]);
        const float d_active = kGated ? d * widen(up[i]) : d;
        const ValueAndGradient active = Act::gradient(widen(gate[i]), d_active);
        narrow(active.gradient, dgate[i]);
        if (kGated) narrow(d * active.value, dup[i]);
        sums[i] += std::fabs(active.value * d_active);
    }
}

struct Forward {
    Matrix gate, up;
    OutputMatrix h;

    template <typename T, typename Act>
    PKE_FAST_INLINE void row(int64_t t, int64_t i, int64_t neurons, float* sums, float* peaks) const {
        if (up.data)
            forward_row<T, Act, true>(at<T>(gate, t, i), at<T>(up, t, i), at<T>(h, t, i), sums, peaks, neurons);
        else
            forward_row<T, Act, false>(at<T>(gate, t, i), nullptr, at<T>(h, t, i), sums, peaks, neurons);
    }
};

struct Backward {
    Matrix dh, gate, up;
    OutputMatrix dgate, dup;

    template <typename T, typename Act>
    PKE_FAST_INLINE void row(int64_t t, int64_t i, int64_t neurons, float* sums, float*) const {
        if (up.data)
            backward_row<T, Act, true>(at<T>(dh, t, i), at<T>(gate, t, i), at<T>(up, t, i), at<T>(dgate, t, i),
                                       at<T>(dup, t, i), sums, neurons);
        else
            backward_row<T, Act, false>(at<T>(dh, t, i), at<T>(gate, t, i), nullptr, at<T>(dgate, t, i), nullptr, sums,
                                        neurons);
    }
};

template <typename T, typename Act, typename Pass>
PKE_FAST_INLINE void run_rows(const Pass& pass, const Tile& tile, const uint8_t* mask) {
    float sums[kNeurons] = {}, peaks[kNeurons] = {};
    float ignored[2][kNeurons];
    for (int64_t t = tile.tokens.first; t < tile.tokens.end; ++t) {
        const bool counts = !mask || mask[t];
        pass.template row<T, Act>(t, tile.first, tile.neurons, counts ? sums : ignored[0], counts ? peaks : ignored[1]);
    }
    if (tile.sums) std::copy_n(sums, tile.neurons, tile.sums);
    if (tile.peaks) std::copy_n(peaks, tile.neurons, tile.peaks);
}

template <typename T, typename Pass>
PKE_FAST_INLINE void run_act(Activation act, const Pass& pass, const Tile& tile, const uint8_t* mask) {
    switch (act) {
        case Activation::silu:
            return run_rows<T, Silu>(pass, tile, mask);
        case Activation::gelu:
            return run_rows<T, Gelu>(pass, tile, mask);
        case Activation::gelu_tanh:
            return run_rows<T, GeluTanh>(pass, tile, mask);
        case Activation::relu:
            return run_rows<T, Relu>(pass, tile, mask);
        case Activation::relu2:
            return run_rows<T, Relu2>(pass, tile, mask);
    }
}

// A function for each type: GCC 12 gives up on vectorising one that holds them all.
PKE_FAST_WIDEST void run_fp32(Activation act, const Forward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<float>(act, pass, tile, mask);
}
PKE_FAST_WIDEST void run_bf16(Activation act, const Forward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<BFloat16>(act, pass, tile, mask);
}
PKE_FAST_WIDEST void run_fp16(Activation act, const Forward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<Float16>(act, pass, tile, mask);
}
PKE_FAST_WIDEST void run_fp32(Activation act, const Backward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<float>(act, pass, tile, mask);
}
PKE_FAST_WIDEST void run_bf16(Activation act, const Backward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<BFloat16>(act, pass, tile, mask);
}
PKE_FAST_WIDEST void run_fp16(Activation act, const Backward& pass, const Tile& tile, const uint8_t* mask) {
    run_act<Float16>(act, pass, tile, mask);
}

template <typename Pass>
void run(const GluShape& shape, const Pass& pass, const Tile& tile) {
    switch (shape.type) {
        case Dtype::fp32:
            return run_fp32(shape.act, pass, tile, shape.mask);
        case Dtype::bf16:
            return run_bf16(shape.act, pass, tile, shape.mask);
        case Dtype::fp16:
            return run_fp16(shape.act, pass, tile, shape.mask);
    }
}

// Every range by every block of neurons. The ranges of a block follow each other, so that threads start in pages of
// their own: where two touch a huge page for the first time at once, the system clears one for each.
template <typename Pass>
void run_all(const GluShape& shape, const Pass& pass, const std::vector<TokenRange>& ranges, const Partials& sums,
             const Partials* peaks, std::size_t threads) {
    const int64_t blocks = (shape.neurons + kNeurons - 1) / kNeurons;
    parallel_for(ranges.size() * blocks, threads, [&](std::size_t task) {
        const std::size_t j = task % ranges.size();
        const int64_t first = static_cast<int64_t>(task / ranges.size()) * kNeurons;
        Tile tile{ranges[j], first, std::min(kNeurons, shape.neurons - first), nullptr, nullptr};
        if (sums.row(j)) {
            tile.sums = sums.row(j) + first;
            if (peaks) tile.peaks = peaks->row(j) + first;
        }
        run(shape, pass, tile);
    });
}

void expect_result(const GluShape& shape, OutputMatrix result) {
    const int64_t elements = shape.tokens ? (shape.tokens - 1) * result.stride + shape.neurons : 0;
    prefer_huge_pages(result.data, elements * (shape.type == Dtype::fp32 ? 4 : 2));
}

std::size_t threads_for(int64_t elements, std::size_t threads) {
    return std::min(threads, static_cast<std::size_t>(elements / kAlone + 1));
}

float add(float a, float b) { return a + b; }

// body(request, first, end) for every request by every block of neurons.
template <typename Body>
void by_request(const GluShape& shape, std::size_t ranges, std::size_t threads, const Body& body) {
    const int64_t blocks = (shape.neurons + kNeurons - 1) / kNeurons;
    const int64_t read = static_cast<int64_t>(ranges) * shape.neurons;
    parallel_for(shape.requests * blocks, threads_for(read, threads), [&](std::size_t task) {
        const int64_t first = static_cast<int64_t>(task % blocks) * kNeurons;
        body(static_cast<int64_t>(task / blocks), first, std::min(first + kNeurons, shape.neurons));
    });
}

// The request's tokens that count, at least 1.
int64_t counted(const GluShape& shape, int64_t request) {
    const int64_t first = shape.offsets[request], end = shape.offsets[request + 1];
    int64_t count = end - first;
    if (shape.mask) count = std::count_if(shape.mask + first, shape.mask + end, [](uint8_t m) { return m != 0; });
    return std::max<int64_t>(count, 1);
}

}  // namespace

void glu_score_fwd(const GluShape& shape, Matrix gate, Matrix up, OutputMatrix h, float* mean, float* peak,
                   std::size_t threads) {
    threads = threads_for(shape.tokens * shape.neurons, threads);
    const auto ranges = token_ranges(shape.offsets, shape.requests, shape.tokens, kTokens);
    const Partials sums(ranges, shape.requests, shape.neurons, mean);
    const Partials peaks(ranges, shape.requests, shape.neurons, peak);
    expect_result(shape, h);
    run_all(shape, Forward{gate, up, h}, ranges, sums, &peaks, threads);
    by_request(shape, ranges.size(), threads, [&](int64_t request, int64_t first, int64_t end) {
        sums.combine(request, first, end, add);
        peaks.combine(request, first, end, [](float a, float b) { return b > a ? b : a; });
        const float count = static_cast<float>(counted(shape, request));
        for (int64_t i = request * shape.neurons + first; i < request * shape.neurons + end; ++i) {
            // Comparing passes over NaN, adding keeps it.
            if (std::isnan(mean[i])) peak[i] = mean[i];
            mean[i] /= count;
        }
    });
}

void glu_score_bwd(const GluShape& shape, Matrix dh, Matrix gate, Matrix up, OutputMatrix dgate, OutputMatrix dup,
                   float* path, std::size_t threads) {
    threads = threads_for(shape.tokens * shape.neurons, threads);
    const auto ranges = token_ranges(shape.offsets, shape.requests, shape.tokens, kTokens);
    const Partials sums(ranges, shape.requests, shape.neurons, path);
    expect_result(shape, dgate);
    if (dup.data) expect_result(shape, dup);
    run_all(shape, Backward{dh, gate, up, dgate, dup}, ranges, sums, nullptr, threads);
    by_request(shape, ranges.size(), threads,
               [&](int64_t request, int64_t first, int64_t end) { sums.combine(request, first, end, add); });
}

}  // namespace pke_fast
