// The kernels of select_hotspots: a radix selection, then a gather that keeps the order of positions.
//
// A selection finds its cut, the key of the k-th score, digit by digit from the top: count_digits counts the scores
// that share the digits found so far by their next one, and the last block to finish picks the digit that holds the
// k-th. Then plan_tiles counts what each tile will give, and gather writes it where it belongs. Under a cap every layer
// is a selection first; what its cut leaves is what the row's selection sees.
//
// Only integers are added by several blocks at once, and addition of integers does not depend on the order: the same
// input gives the same output every time. No block waits for another.
#pragma once

#include "cuda_block.cuh"
#include "score_order.h"

namespace pke_fast {

constexpr unsigned kThreads = 512;
constexpr uint32_t kTile = 4096;  // scores of a block at most: 8 a thread, and 112 blocks and more for one usual row
constexpr uint32_t kBins = 2048;  // of the widest digit, 11 bits

// Where a selection ends: keys above `key` are chosen, and the first `ties` of those that equal it. While it goes on,
// the digits of the key that are known, and how many are still to be chosen among the keys that have them.
struct Cut {
    uint32_t key;
    uint32_t ties;
};

// What one tile gives: scores above its layer's cut, those on it, how many of these are chosen, and how many of the row
// are chosen before this tile.
struct Tile {
    uint32_t above, on, ties, before;
};

struct Digit {
    uint32_t shift, width;
};

template <typename Format>
struct Problem {
    const typename Format::Bits* scores;  // [rows, layers, neurons]
    const uint8_t* exclude;               // the same shape, or null
    uint32_t lowest;                      // the least key that may be chosen
    uint32_t layers, neurons, first, window;
    uint32_t tiles, tile_width;  // of a layer
};

// One radix selection a row, or a layer of the window.
struct Selections {
    uint32_t* bins;     // [selections, kBins], zero between launches
    uint32_t* tickets;  // [selections], likewise
    Cut* cuts;          // [selections]
    bool by_layer;
    uint32_t k;
};

// What belongs to this block. `from` and `count` are the tile's neurons within its layer.
struct Place {
    uint32_t row, layer, tile, from, count;
    size_t begin;  // its first score's position

    template <typename Format>
    __device__ explicit Place(const Problem<Format>& problem) {
        const uint32_t tiles_of_row = problem.window * problem.tiles;
        row = blockIdx.x / tiles_of_row;
        tile = blockIdx.x % tiles_of_row;  // within the row
        layer = tile / problem.tiles;      // within the window
        from = tile % problem.tiles * problem.tile_width;
        count = from < problem.neurons ? min(problem.tile_width, problem.neurons - from) : 0;
        begin = (static_cast<size_t>(row) * problem.layers + problem.first + layer) * problem.neurons + from;
    }
};

// The tile's scores as this thread sees them: in every round, kLanes neighbours from start(round) on.
template <typename Format>
struct Share {
    using Bits = typename Format::Bits;
    static constexpr int kLanes = 16 / sizeof(Bits);
    static constexpr int kRounds = kTile / (kThreads * kLanes);

    Vector<Bits, kLanes> scores[kRounds];
    uint32_t count;  // of the tile

    __device__ static uint32_t start(int round) { return (round * kThreads + threadIdx.x) * kLanes; }
    __device__ int held(int round) const {
        return count > start(round) ? static_cast<int>(min(count - start(round), uint32_t{kLanes})) : 0;
    }

    __device__ Share(const Problem<Format>& problem, const Place& place) : count(place.count) {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {  // all loads are under way before the first is used
            scores[round] = load<kLanes>(problem.scores + place.begin + start(round), held(round));
        }
    }

    // visit(round, lane, key) for each score; the first two are constants to the compiler.
    template <typename Visit>
    __device__ void visit_all(Visit visit) const {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
#pragma unroll
            for (int j = 0; j < kLanes; ++j) {
                if (j < held(round)) visit(round, j, order_key<Format>(scores[round].lane[j]));
            }
        }
    }
};

// The last block of a selection: picks the digit of the k-th key from the counts, and leaves them zero.
__device__ inline void pick_digit(uint32_t* bins, uint32_t width, Cut known, Cut* result,
                                  uint32_t (&warp_sums)[kThreads / kWarp]) {
    constexpr int kEach = kBins / kThreads;
    const int top = (1 << width) - 1 - kEach * static_cast<int>(threadIdx.x);  // this thread's, downwards
    uint32_t counts[kEach], sum = 0, all;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        counts[j] = top >= j ? bins[top - j] : 0;
        if (top >= j) bins[top - j] = 0;
        sum += counts[j];
    }
    uint32_t above = block_scan<kThreads>(sum, warp_sums, all);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
        // One digit alone holds the k-th; where there are fewer than k, the lowest stands for it, with all that it has.
        if (top >= j && above < known.ties && (known.ties <= above + counts[j] || top == j)) {
            *result = {known.key << width | static_cast<uint32_t>(top - j), min(known.ties - above, counts[j])};
        }
        above += counts[j];
    }
    if (threadIdx.x == 0 && known.ties == 0) *result = {known.key << width | static_cast<uint32_t>(top), 0};
}

// One digit of every selection. `layer_cuts`, [rows, window] or null: what a cap has left of the layers; only this
// counts. `nans`, [rows] or null: adds the NaN of the window, excluded ones too.
template <typename Format, bool kFirst>
__global__ void __launch_bounds__(kThreads) count_digits(Problem<Format> problem, Selections selections, Digit digit,
                                                         const Cut* layer_cuts, unsigned long long* nans) {
    __shared__ struct {
        uint32_t bins[kBins];
        uint32_t warp_sums[kThreads / kWarp];
        uint32_t nans;
        bool last;
    } shared;
    const Place place(problem);
    const Share<Format> share(problem, place);
    const uint32_t bins = 1u << digit.width;
    for (uint32_t bin = threadIdx.x; bin < bins; bin += kThreads) shared.bins[bin] = 0;
    if (threadIdx.x == 0) shared.nans = 0;
    __syncthreads();

    const size_t layer = static_cast<size_t>(place.row) * problem.window + place.layer;
    const size_t selection = selections.by_layer ? layer : place.row;
    const Cut known = kFirst ? Cut{0, selections.k} : selections.cuts[selection];
    const auto digits_fit = [&](uint32_t key) { return kFirst || key >> (digit.shift + digit.width) == known.key; };
    const auto count = [&](uint32_t key, uint32_t times) {
        atomicAdd(&shared.bins[(key >> digit.shift) & (bins - 1)], times);
    };
    const uint8_t* exclude = problem.exclude ? problem.exclude + place.begin : nullptr;
    constexpr int kRounds = Share<Format>::kRounds, kLanes = Share<Format>::kLanes;
    Vector<uint8_t, kLanes> flags[kRounds]{};
    if (kFirst && exclude) {  // nearly every score's flag is needed; later they are read one by one
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            flags[round] = load<kLanes>(exclude + share.start(round), share.held(round));
        }
    }
    const Cut cap = layer_cuts ? layer_cuts[layer] : Cut{0, 0};
    uint32_t own_nans = 0;
    share.visit_all([&](int round, int j, uint32_t key) {
        own_nans += kFirst && key == kNaN;
        if (key < problem.lowest || (layer_cuts && key <= cap.key) || !digits_fit(key)) return;
        const bool excluded = kFirst ? flags[round].lane[j] : exclude && exclude[share.start(round) + j];
        if (!excluded) count(key, 1);
    });
    // A cap's ties are alike: one thread counts as many of them as it leaves.
    if (cap.ties && place.from == 0 && threadIdx.x == 0 && digits_fit(cap.key)) count(cap.key, cap.ties);
    if (kFirst && nans && own_nans) atomicAdd(&shared.nans, own_nans);
    __syncthreads();

    uint32_t* counts = selections.bins + selection * kBins;
    for (uint32_t bin = threadIdx.x; bin < bins; bin += kThreads) {
        if (shared.bins[bin]) atomicAdd(&counts[bin], shared.bins[bin]);
    }
    if (threadIdx.x == 0 && shared.nans) atomicAdd(&nans[place.row], static_cast<unsigned long long>(shared.nans));
    const uint32_t blocks = selections.by_layer ? problem.tiles : problem.window * problem.tiles;
    if (!is_last_block(&selections.tickets[selection], blocks, shared.last)) return;
    pick_digit(counts, digit.width, known, &selections.cuts[selection], shared.warp_sums);
}

// Counts what every tile gives; the last block of a row then says where it goes.
template <typename Format>
__global__ void __launch_bounds__(kThreads)
    plan_tiles(Problem<Format> problem, const Cut* row_cuts, const Cut* layer_cuts, uint32_t* tickets, Tile* tiles,
               uint32_t* chosen, const unsigned long long* nans, int64_t* nan_counts) {
    __shared__ struct {
        unsigned long long warp_sums[kThreads / kWarp];
        uint32_t above_and_on;  // two counts of at most kTile in one integer
        bool last;
    } shared;
    const Place place(problem);
    const Share<Format> share(problem, place);
    if (threadIdx.x == 0) shared.above_and_on = 0;
    __syncthreads();

    const Cut cut = row_cuts[place.row];
    const Cut* caps = layer_cuts ? layer_cuts + static_cast<size_t>(place.row) * problem.window : nullptr;
    const uint32_t least = caps ? max(cut.key, caps[place.layer].key) : cut.key;
    const uint8_t* exclude = problem.exclude ? problem.exclude + place.begin : nullptr;
    uint32_t own = 0;
    share.visit_all([&](int round, int j, uint32_t key) {
        if (key < max(least, problem.lowest) || (exclude && exclude[share.start(round) + j])) return;
        own += key == least ? 1u << 16 : 1u;
    });
    if (own) atomicAdd(&shared.above_and_on, own);
    __syncthreads();
    const uint32_t tiles_of_row = problem.window * problem.tiles;
    tiles += static_cast<size_t>(place.row) * tiles_of_row;
    if (threadIdx.x == 0) {
        tiles[place.tile].above = shared.above_and_on & 0xffffu;
        tiles[place.tile].on = shared.above_and_on >> 16;
    }
    if (!is_last_block(&tickets[place.row], tiles_of_row, shared.last)) return;

    constexpr unsigned kHalf = 32;
    unsigned long long sums = 0;  // of the tiles so far: chosen for certain, and above that half, on the row's cut
    for (uint32_t start = 0; start < tiles_of_row; start += kThreads) {
        const uint32_t tile = start + threadIdx.x;
        uint32_t certain = 0, on = 0;
        bool on_row_cut = true;
        if (tile < tiles_of_row) {
            const uint32_t layer = tile / problem.tiles;
            on = tiles[tile].on;
            if (caps && caps[layer].key >= cut.key) {  // the cap may take some of them away: the layer's last ones
                uint32_t left = caps[layer].ties;
                for (uint32_t t = layer * problem.tiles; t < tile; ++t) left -= min(left, tiles[t].on);
                on = min(on, left);
                on_row_cut = caps[layer].key == cut.key;
            }
            certain = tiles[tile].above + (on_row_cut ? 0 : on);
        }
        const unsigned long long mine = static_cast<unsigned long long>(on_row_cut ? on : 0) << kHalf | certain;
        unsigned long long total;
        const unsigned long long before = sums + block_scan<kThreads>(mine, shared.warp_sums, total);
        if (tile < tiles_of_row) {
            const uint32_t taken = min(static_cast<uint32_t>(before >> kHalf), cut.ties);
            tiles[tile].before = static_cast<uint32_t>(before) + taken;
            tiles[tile].ties = on_row_cut ? min(on, cut.ties - taken) : on;
        }
        sums += total;
    }
    if (threadIdx.x == 0) {
        chosen[place.row] = static_cast<uint32_t>(sums) + min(static_cast<uint32_t>(sums >> kHalf), cut.ties);
        nan_counts[place.row] = static_cast<int64_t>(nans[place.row]);
    }
}

// Writes the chosen neurons and the pointers to them.
template <typename Format>
__global__ void __launch_bounds__(kThreads)
    gather(Problem<Format> problem, const Cut* row_cuts, const Cut* layer_cuts, const Tile* tiles,
           const uint32_t* chosen, int64_t* layer_ptr, int64_t* neurons) {
    __shared__ union {
        unsigned long long row_sums[kThreads / kWarp];
        uint32_t warp_sums[kThreads / kWarp];
    } shared;
    const Place place(problem);
    unsigned long long base = 0;  // of the row: what the rows before it chose
    if (place.row > 0) {
        unsigned long long mine = 0;
        for (uint32_t row = threadIdx.x; row < place.row; row += kThreads) mine += chosen[row];
        block_scan<kThreads>(mine, shared.row_sums, base);
    }
    const Tile tile = tiles[blockIdx.x];
    layer_ptr += place.row * (static_cast<size_t>(problem.layers) + 1);
    if (place.tile == 0) {
        for (uint32_t layer = threadIdx.x; layer <= problem.layers; layer += kThreads) {
            if (layer <= problem.first) layer_ptr[layer] = static_cast<int64_t>(base);
            if (layer >= problem.first + problem.window) {
                layer_ptr[layer] = static_cast<int64_t>(base + chosen[place.row]);
            }
        }
    } else if (place.from == 0 && threadIdx.x == 0) {
        layer_ptr[problem.first + place.layer] = static_cast<int64_t>(base + tile.before);
    }
    if (tile.above + tile.ties == 0) return;  // most tiles where k is small: nothing more is read

    const Share<Format> share(problem, place);
    const uint32_t cut = row_cuts[place.row].key;
    const size_t layer = static_cast<size_t>(place.row) * problem.window + place.layer;
    const uint32_t least = layer_cuts ? max(cut, layer_cuts[layer].key) : cut;
    const uint8_t* exclude = problem.exclude ? problem.exclude + place.begin : nullptr;
    neurons += base + tile.before;
    uint32_t rounds_before = 0;  // as above_and_on
#pragma unroll
    for (int round = 0; round < Share<Format>::kRounds; ++round) {
        uint32_t above = 0, on = 0;  // flags, one a lane
#pragma unroll
        for (int j = 0; j < Share<Format>::kLanes; ++j) {
            if (j >= share.held(round)) continue;
            const uint32_t key = order_key<Format>(share.scores[round].lane[j]);
            if (key < max(least, problem.lowest) || (exclude && exclude[share.start(round) + j])) continue;
            (key == least ? on : above) |= 1u << j;
        }
        uint32_t all;
        const uint32_t own = static_cast<uint32_t>(__popc(above) | __popc(on) << 16);
        uint32_t before = rounds_before + block_scan<kThreads>(own, shared.warp_sums, all);
        rounds_before += all;
        for (uint32_t flags = above | on; flags; flags &= flags - 1) {
            const uint32_t flag = flags & (0u - flags);
            const uint32_t ties = before >> 16;
            if (above & flag || ties < tile.ties) {
                const uint32_t neuron = place.from + share.start(round) + static_cast<uint32_t>(__ffs(flag)) - 1;
                neurons[(before & 0xffffu) + min(ties, tile.ties)] = neuron;
            }
            before += above & flag ? 1u : 1u << 16;
        }
    }
}

}  // namespace pke_fast
