// select_hotspots' CUDA kernels on the CPU: a function for tests/test_select_hotspots_emulated.py, and a program that
// compares them with the C++ form on random problems, to be run under a sanitizer.
#include <cstdio>
#include <random>

#include "select_hotspots.cu"

namespace {

// A copy of the scratch's size whose content is as little zero as that of fresh device memory.
std::vector<uint64_t> dirty(std::size_t bytes) { return std::vector<uint64_t>(bytes / 8 + 2, 0xa5a5a5a5a5a5a5a5u); }

}  // namespace

extern "C" void emulated_select_hotspots(const void* scores, int format, std::size_t rows, std::size_t layers,
                                         std::size_t neurons, std::size_t k, std::size_t first, std::size_t end,
                                         std::size_t layer_cap, const uint8_t* exclude, float minimum,
                                         int64_t* layer_ptr, int64_t* chosen_neurons, int64_t* nan_counts) {
    const pke_fast::HotspotQuery query{scores, rows, layers, neurons, k, first, end, layer_cap, exclude, minimum};
    std::vector<uint64_t> scratch = dirty(pke_fast::hotspot_scratch_size(query));
    void* aligned = scratch.data() + (reinterpret_cast<uintptr_t>(scratch.data()) % 16 ? 1 : 0);
    pke_fast::select_hotspots_cuda(query, static_cast<pke_fast::Dtype>(format), {layer_ptr, chosen_neurons, nan_counts},
                                   aligned, nullptr);
}

int main(int, char**) {
    std::mt19937 random(1);
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    for (int trial = 0; trial < 24; ++trial) {
        const std::size_t rows = 1 + below(3), layers = 1 + below(3);
        const std::size_t widths[] = {1, 63, 300, 4096, 5000, 9001};
        const std::size_t neurons = widths[below(6)], size = layers * neurons;
        const bool half = trial % 2;
        std::vector<uint32_t> bits(rows * size);
        const uint32_t few = trial % 3 ? 0xffffffffu : 0xc0c00000u;  // every third time ties everywhere
        for (uint32_t& score : bits) score = static_cast<uint32_t>(random()) & few & (half ? 0xffff0000u : 0xffffffffu);
        std::vector<uint16_t> halves;
        for (uint32_t score : bits) halves.push_back(static_cast<uint16_t>(score >> 16));
        std::vector<uint8_t> exclude(rows * size);
        for (uint8_t& flag : exclude) flag = below(4) == 0;
        const std::size_t first = below(layers), end = first + below(layers - first + 1);
        pke_fast::HotspotQuery query{bits.data(),
                                     rows,
                                     layers,
                                     neurons,
                                     below(size + 1),
                                     first,
                                     end,
                                     trial % 4 < 2 ? 0 : 1 + below(neurons),
                                     trial % 5 ? exclude.data() : nullptr,
                                     trial % 7 ? -INFINITY : 0.0f};
        struct Output {
            std::vector<int64_t> layer_ptr, neurons, nans;
            Output(std::size_t rows, std::size_t layers, std::size_t k)
                : layer_ptr(rows * (layers + 1), -1), neurons(rows * k, -1), nans(rows, -1) {}
        } expected(rows, layers, query.k), got(rows, layers, query.k);
        pke_fast::select_hotspots(query, {expected.layer_ptr.data(), expected.neurons.data(), expected.nans.data()});
        emulated_select_hotspots(half ? static_cast<void*>(halves.data()) : bits.data(), half, rows, layers, neurons,
                                 query.k, first, end, query.layer_cap, query.exclude, query.minimum,
                                 got.layer_ptr.data(), got.neurons.data(), got.nans.data());
        if (got.layer_ptr != expected.layer_ptr || got.neurons != expected.neurons || got.nans != expected.nans) {
            std::fprintf(stderr, "trial %d: not what the C++ form chooses\n", trial);
            return 1;
        }
    }
    std::puts("emulated kernels choose what the C++ form chooses");
    return 0;
}
