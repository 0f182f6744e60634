// Tokens in ranges that never cross a request: what a call is split into comes from the shape alone, so the same input
// gives the same bits on any number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pke_fast {

struct TokenRange {
    int64_t first, end;
    int64_t request;  // -1: of no request
};

// Request r owns the tokens offsets[r] .. offsets[r + 1] - 1; offsets ascend within 0 .. tokens. Every token is in one
// range, of at most `longest` tokens; the ranges are in the tokens' order.
inline std::vector<TokenRange> token_ranges(const int64_t* offsets, int64_t requests, int64_t tokens, int64_t longest) {
    std::vector<TokenRange> ranges;
    const auto cut = [&](int64_t first, int64_t end, int64_t request) {
        for (; first < end; first += longest) ranges.push_back({first, std::min(first + longest, end), request});
    };
    cut(0, offsets[0], -1);
    for (int64_t r = 0; r < requests; ++r) cut(offsets[r], offsets[r + 1], r);
    cut(offsets[requests], tokens, -1);
    return ranges;
}

// What each range has of a result [requests, width], one row a range: the result's own row where a request is a single
// range, scratch where it is several, null where it is none.
class Partials {
  public:
    Partials(const std::vector<TokenRange>& ranges, int64_t requests, int64_t width, float* result)
        : width_(width), result_(result), of_request_(requests), rows_(ranges.size()) {
        std::size_t shared = 0;
        for (const TokenRange& range : ranges)
            if (range.request >= 0) ++of_request_[range.request].count;
        for (const Span& span : of_request_) shared += span.count > 1 ? span.count : 0;
        if (shared) scratch_.reset(new float[shared * width]);
        float* next = scratch_.get();
        for (std::size_t j = ranges.size(); j-- > 0;) {
            const int64_t request = ranges[j].request;
            if (request < 0) continue;
            of_request_[request].first = j;
            rows_[j] = of_request_[request].count > 1 ? next : result + request * width;
            if (rows_[j] == next) next += width;
        }
    }

    float* row(std::size_t range) const { return rows_[range]; }

    // The result's columns first .. end - 1 of one request, from its ranges in order: 0 where it has none.
    template <typename Combine>
    void combine(int64_t request, int64_t first, int64_t end, const Combine& combined) const {
        float* into = result_ + request * width_;
        const Span span = of_request_[request];
        if (span.count == 0) std::fill(into + first, into + end, 0.0f);
        if (span.count <= 1) return;
        std::copy(rows_[span.first] + first, rows_[span.first] + end, into + first);
        for (std::size_t j = span.first + 1; j < span.first + span.count; ++j)
            for (int64_t i = first; i < end; ++i) into[i] = combined(into[i], rows_[j][i]);
    }

  private:
    struct Span {
        std::size_t first = 0, count = 0;
    };
    int64_t width_;
    float* result_;
    std::vector<Span> of_request_;
    std::vector<float*> rows_;
    std::unique_ptr<float[]> scratch_;
};

}  // namespace pke_fast
