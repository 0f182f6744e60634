#include "select_hotspots.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "score_order.h"
#include "widest.h"

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace pke_fast {
namespace {

inline uint32_t raw_key(float score) { return pke_fast::raw_key<score_format::Float32>(bits_of(score)); }
inline uint32_t order_key(float score) { return pke_fast::order_key<score_format::Float32>(bits_of(score)); }

// Scores looked at together: one test skips them all. 64 fill four AVX-512 registers and one word of flags.
constexpr std::size_t kBlock = 64;

// Scores that may still be chosen, in ascending order of their position.
struct Candidates {
    std::vector<uint32_t> keys;
    std::vector<int64_t> positions;
    std::size_t count = 0;

    void reserve(std::size_t size) {
        if (keys.size() < size) {
            keys.resize(size);
            positions.resize(size);
        }
    }
    std::size_t room() const { return keys.size() - count; }
    void add(uint32_t key, std::size_t position) {
        keys[count] = key;
        positions[count++] = static_cast<int64_t>(position);
    }
};

struct Scan {
    const float* scores;
    const uint8_t* exclude;
    std::size_t next;  // the position to go on from
    std::size_t end;
    uint32_t lowest;  // the least key worth keeping
    std::size_t nans;
};

inline std::size_t lowest_bit(uint64_t word) {
#ifdef _MSC_VER
    unsigned long index;
    _BitScanForward64(&index, word);
    return index;
#else
    return static_cast<std::size_t>(__builtin_ctzll(word));
#endif
}

inline void look_at(Scan& scan, std::size_t position, Candidates& into) {
    const uint32_t key = order_key(scan.scores[position]);
    scan.nans += key == kNaN;
    if (key >= scan.lowest && !(scan.exclude && scan.exclude[position])) into.add(key, position);
}

// Appends what reaches `lowest`, up to the end or until there is no room for another block.
PKE_FAST_WIDEST void run(Scan& scan, Candidates& into) {
    const uint32_t lowest = scan.lowest ? scan.lowest - 1 : 0;  // as a raw key; NaN passes too, to be counted
    std::size_t next = scan.next;
    for (; scan.end - next >= kBlock && into.room() >= kBlock; next += kBlock) {
        const float* block = scan.scores + next;
        uint32_t greatest = 0;
        for (std::size_t j = 0; j < kBlock; ++j) greatest = std::max(greatest, raw_key(block[j]));
        if (greatest < lowest) continue;
        uint64_t hits = 0;
        for (std::size_t j = 0; j < kBlock; ++j) hits |= static_cast<uint64_t>(raw_key(block[j]) >= lowest) << j;
        for (; hits; hits &= hits - 1) look_at(scan, next + lowest_bit(hits), into);
    }
    if (scan.end - next < kBlock && into.room() >= kBlock) {
        for (; next < scan.end; ++next) look_at(scan, next, into);
    }
    scan.next = next;
}

// Keeps the best k (at least 1) of the candidates behind `from`, in their order, and returns the least key kept.
uint32_t keep_best(Candidates& all, std::size_t from, std::size_t k, std::vector<uint32_t>& scratch) {
    uint32_t* keys = all.keys.data() + from;
    int64_t* positions = all.positions.data() + from;
    const std::size_t count = all.count - from;
    scratch.assign(keys, keys + count);
    const auto kth = scratch.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(scratch.begin(), kth, scratch.end(), std::greater<uint32_t>());
    const uint32_t least = *kth;
    std::size_t ties = k;
    for (std::size_t i = 0; i < count; ++i) ties -= keys[i] > least;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const uint32_t key = keys[i];
        const bool tie = key == least && ties > 0;  // the first ones have the lowest positions
        ties -= tie;
        if (tie || key > least) {
            keys[kept] = key;
            positions[kept++] = positions[i];
        }
    }
    all.count = from + k;
    return least;
}

// A key that very likely at least k of the scan reach, and not many more: a rank among evenly spaced samples. Only the
// time depends on it, never the result.
uint32_t guess_lowest(const Scan& scan, std::size_t k, std::vector<uint32_t>& scratch) {
    // Some 256 samples above the wanted key, for a small k fewer, so that sampling stays well below the cost of a pass.
    // Odd, to fall out of step with the layers' widths.
    const std::size_t spacing = std::max<std::size_t>(61, k / 256 | 1);
    const double expected = static_cast<double>(k) / static_cast<double>(spacing);
    // Four standard deviations of a Poisson count, and four more: too few reach it about once in 30,000 times.
    const std::size_t rank = static_cast<std::size_t>(expected + 4.0 * std::sqrt(expected) + 4.0);
    if (rank >= (scan.end - scan.next) / spacing) return kNaN;
    scratch.assign(rank + 1, kNaN);  // a heap of the greatest samples, the least of them in front
    for (std::size_t i = scan.next; i < scan.end; i += spacing) {
        const uint32_t key = order_key(scan.scores[i]);
        if (key <= scratch.front() || (scan.exclude && scan.exclude[i])) continue;
        std::pop_heap(scratch.begin(), scratch.end(), std::greater<uint32_t>());
        scratch.back() = key;
        std::push_heap(scratch.begin(), scratch.end(), std::greater<uint32_t>());
    }
    return scratch.front();
}

// Appends the best k (at least 1) of the scan that reach `minimum`, in ascending order of position; returns the NaNs.
std::size_t append_best(Scan scan, std::size_t k, uint32_t minimum, Candidates& into, std::vector<uint32_t>& scratch) {
    const std::size_t begin = scan.next;
    const std::size_t from = into.count;
    // Every cut frees at least half of the room, so the cuts cost O(n) together; 4096 saves cuts where k is small.
    into.reserve(from + k + std::max<std::size_t>(k, 4096) + kBlock);
    const uint32_t guess = std::max(minimum, guess_lowest(scan, k, scratch));
    for (uint32_t lowest : {guess, minimum}) {  // the second time if the guess was too high
        into.count = from;
        scan.next = begin;
        scan.nans = 0;
        scan.lowest = lowest;
        do {
            run(scan, into);
            // What comes later loses a tie, so it has to be better than the least one kept.
            if (into.count - from > k) scan.lowest = keep_best(into, from, k, scratch) + 1;
        } while (scan.next < scan.end);
        if (into.count - from == k || guess == minimum) break;
    }
    return scan.nans;
}

// One row's best, in ascending order of position; returns the NaNs.
std::size_t choose(const HotspotQuery& query, const float* scores, const uint8_t* exclude, Candidates& found,
                   std::vector<uint32_t>& scratch) {
    const bool bounded = !(std::isinf(query.minimum) && query.minimum < 0);
    uint32_t minimum = bounded ? order_key(query.minimum) : kNaN;
    const std::size_t k = std::max<std::size_t>(query.k, 1);
    // Under a cap layer by layer; the others have to beat what the layers before them gave.
    const std::size_t step = query.layer_cap ? 1 : query.end - query.first;
    const std::size_t most = query.layer_cap ? std::min(query.layer_cap, k) : k;

    found.count = 0;
    std::size_t nans = 0;
    for (std::size_t layer = query.first; layer < query.end; layer += step) {
        const Scan scan{scores, exclude, layer * query.neurons, (layer + step) * query.neurons, minimum, 0};
        nans += append_best(scan, most, minimum, found, scratch);
        if (found.count >= 2 * k) minimum = keep_best(found, 0, k, scratch) + 1;
    }
    if (found.count > k) keep_best(found, 0, k, scratch);
    if (query.k == 0) found.count = 0;
    return nans;
}

}  // namespace

void select_hotspots(const HotspotQuery& query, const HotspotResult& result) {
    Candidates found;
    std::vector<uint32_t> scratch;
    int64_t* layer_ptr = result.layer_ptr;
    int64_t chosen = 0;
    for (std::size_t row = 0; row < query.rows; ++row) {
        const std::size_t offset = row * query.layers * query.neurons;
        const uint8_t* exclude = query.exclude ? query.exclude + offset : nullptr;
        const auto* scores = static_cast<const float*>(query.scores);
        result.nan_counts[row] = static_cast<int64_t>(choose(query, scores + offset, exclude, found, scratch));
        std::size_t i = 0;
        for (std::size_t layer = 0; layer < query.layers; ++layer) {
            *layer_ptr++ = chosen;
            const int64_t base = static_cast<int64_t>(layer * query.neurons);
            const int64_t next_base = base + static_cast<int64_t>(query.neurons);
            for (; i < found.count && found.positions[i] < next_base; ++i) {
                result.neurons[chosen++] = found.positions[i] - base;
            }
        }
        *layer_ptr++ = chosen;
    }
}

}  // namespace pke_fast
