// select_hotspots on a CUDA device: the sizes, the scratch and the launches. The kernels are in select_hotspots.cuh.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "cuda_call.h"
#include "select_hotspots.cuh"
#include "select_hotspots.h"

namespace pke_fast {
namespace {

std::size_t round_up(std::size_t n, std::size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Sizes {
    std::size_t window, tiles, tile_width;  // layers; tiles of a layer, of at most kTile scores
    std::size_t blocks;                     // one a tile

    explicit Sizes(const HotspotQuery& query)
        : window(query.end - query.first),
          tiles((query.neurons + kTile - 1) / kTile),
          // Equal tiles, so that all blocks take as long; a multiple of 8 keeps the loads aligned.
          tile_width(tiles ? round_up((query.neurons + tiles - 1) / tiles, 8) : 0),
          blocks(query.rows * window * tiles) {
        if (query.neurons && query.layers > 0xffffffffu / query.neurons) {
            throw std::invalid_argument("select_hotspots: a row has 2^32 scores or more");
        }
        if (blocks > 0x7fffffffu) throw std::invalid_argument("select_hotspots: too many rows for one call");
    }
};

// Where things lie in the scratch. What has to be zero comes first.
struct Scratch {
    unsigned long long* nans;
    uint32_t *tickets, *row_bins, *layer_bins, *chosen;
    Cut *row_cuts, *layer_cuts;
    Tile* tiles;
    std::size_t zeroed, size;

    Scratch(const HotspotQuery& query, const Sizes& sizes, char* memory) {
        const std::size_t rows = query.rows, layers = query.layer_cap ? rows * sizes.window : 0;
        size = 0;
        const auto take = [&](auto*& pointer, std::size_t count) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + size);
            size = round_up(size + count * sizeof *pointer, 16);
        };
        take(nans, rows);
        take(tickets, std::max(rows, layers));
        take(row_bins, rows * kBins);
        take(layer_bins, layers * kBins);
        zeroed = size;
        take(chosen, rows);
        take(row_cuts, rows);
        take(layer_cuts, layers);
        take(tiles, sizes.blocks);
    }
};

float magnitude(score_format::Float32, uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float magnitude(score_format::BFloat16, uint32_t bits) { return magnitude(score_format::Float32{}, bits << 16); }
float magnitude(score_format::Float16, uint32_t bits) {
    const int exponent = static_cast<int>(bits >> 10), fraction = bits & 1023;
    if (bits == score_format::Float16::kInfinity) return INFINITY;
    return exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
}

// The least key whose number reaches `minimum`, rounded up to the format.
template <typename Format>
uint32_t least_key(float minimum) {
    if (std::isinf(minimum) && minimum < 0) return kNaN;
    uint32_t low = 1, high = kRawInfinity<Format> + 1;  // the keys of the numbers
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2, zero = Format::kInfinity + 1;
        const float number = middle < zero ? -magnitude(Format{}, zero - middle) : magnitude(Format{}, middle - zero);
        number >= minimum ? high = middle : low = middle + 1;
    }
    return low;
}

template <typename Format>
void run(const HotspotQuery& query, const HotspotResult& result, const Sizes& sizes, void* memory,
         cudaStream_t stream) {
    const Scratch scratch(query, sizes, static_cast<char*>(memory));
    check_cuda(cudaMemsetAsync(memory, 0, scratch.zeroed, stream), "select_hotspots, zeroing the scratch");

    const auto narrow = [](std::size_t n) { return static_cast<uint32_t>(n); };  // Sizes has checked that it fits
    Problem<Format> problem{};
    problem.scores = static_cast<const typename Format::Bits*>(query.scores);
    problem.exclude = query.exclude;
    problem.lowest = least_key<Format>(query.minimum);
    problem.layers = narrow(query.layers);
    problem.neurons = narrow(query.neurons);
    problem.first = narrow(query.first);
    problem.window = narrow(sizes.window);
    problem.tiles = narrow(sizes.tiles);
    problem.tile_width = narrow(sizes.tile_width);

    const auto select = [&](const Selections& selections, const Cut* layer_cuts, unsigned long long* nans) {
        const char* name = "select_hotspots, count_digits";
        const auto digit = [&](auto kernel, Digit d) {
            launch(name, kernel, sizes.blocks, kThreads, stream, problem, selections, d, layer_cuts, nans);
        };
        if (sizeof(typename Format::Bits) == 4) {
            digit(count_digits<Format, true>, {21, 11});
            digit(count_digits<Format, false>, {10, 11});
            digit(count_digits<Format, false>, {0, 10});
        } else {
            digit(count_digits<Format, true>, {5, 11});
            digit(count_digits<Format, false>, {0, 5});
        }
    };
    const Cut* layer_cuts = nullptr;
    if (query.layer_cap) {
        const uint32_t most = narrow(std::min(query.layer_cap, query.k));
        select({scratch.layer_bins, scratch.tickets, scratch.layer_cuts, true, most}, nullptr, scratch.nans);
        layer_cuts = scratch.layer_cuts;
    }
    select({scratch.row_bins, scratch.tickets, scratch.row_cuts, false, narrow(query.k)}, layer_cuts,
           layer_cuts ? nullptr : scratch.nans);
    launch("select_hotspots, plan_tiles", plan_tiles<Format>, sizes.blocks, kThreads, stream, problem, scratch.row_cuts,
           layer_cuts, scratch.tickets, scratch.tiles, scratch.chosen, scratch.nans, result.nan_counts);
    launch("select_hotspots, gather", gather<Format>, sizes.blocks, kThreads, stream, problem, scratch.row_cuts,
           layer_cuts, scratch.tiles, scratch.chosen, result.layer_ptr, result.neurons);
}

}  // namespace

std::size_t hotspot_scratch_size(const HotspotQuery& query) {
    const Sizes sizes(query);
    return sizes.blocks ? Scratch(query, sizes, nullptr).size : 0;
}

void select_hotspots_cuda(const HotspotQuery& query, Dtype format, const HotspotResult& result, void* scratch,
                          void* stream) {
    const Sizes sizes(query);
    const auto on = static_cast<cudaStream_t>(stream);
    if (!sizes.blocks) {  // nothing to choose from
        const auto zero = [&](int64_t* from, std::size_t count) {
            if (count) check_cuda(cudaMemsetAsync(from, 0, count * sizeof *from, on), "select_hotspots, empty window");
        };
        zero(result.layer_ptr, query.rows * (query.layers + 1));
        zero(result.nan_counts, query.rows);
        return;
    }
    switch (format) {
        case Dtype::fp32:
            return run<score_format::Float32>(query, result, sizes, scratch, on);
        case Dtype::bf16:
            return run<score_format::BFloat16>(query, result, sizes, scratch, on);
        case Dtype::fp16:
            return run<score_format::Float16>(query, result, sizes, scratch, on);
    }
    throw std::invalid_argument("select_hotspots: unknown format of scores");
}

}  // namespace pke_fast
