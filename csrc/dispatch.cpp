// Layouts, the choice of a kernel, and how a product is divided among threads.
//
// Threads are OpenMP's. Loaded into a process that runs torch, the calls bind to the OpenMP runtime that torch has
// already loaded for everyone, so both use one pool and no thread waits for the other's to stop spinning.

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "kernels.h"

namespace ptq161 {

extern const Kernel kScalar;
#ifdef PTQ161_X86
extern const Kernel kAvx2;
extern const Kernel kAvx512;
#endif
#ifdef PTQ161_NEON
extern const Kernel kNeon;
#endif

const std::vector<const Kernel*>& available_kernels() {
    static const std::vector<const Kernel*> kernels = [] {
        std::vector<const Kernel*> found;
        for (const Kernel* kernel : {
#ifdef PTQ161_X86
                 &kAvx512, &kAvx2,
#endif
#ifdef PTQ161_NEON
                 &kNeon,
#endif
                 &kScalar}) {
            if (kernel->supported()) found.push_back(kernel);
        }
        return found;
    }();
    return kernels;
}

namespace {

constexpr int64_t kMost = int64_t(1) << 28;  // rows or columns; keeps every size far inside 64 bits
constexpr int64_t kMostGroups = 16;

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Bytes of weights under which a second thread costs more than it brings.
constexpr int64_t kBytesPerThread = 96 * 1024;
// Bytes of rounded activations that are multiplied at once: they stay in the second-level cache.
constexpr int64_t kChunkBytes = 384 * 1024;

// work(first row, last row) for all rows, in `pieces` parts for each of as many threads as `bytes` are worth.
template <class Work>
void in_parallel(int64_t all_rows, int64_t bytes, int threads, int64_t pieces, const Work& work) {
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>({threads, all_rows, bytes / kBytesPerThread}));
    const int64_t parts = workers == 1 ? 1 : workers * pieces, rows = ceil_div(all_rows, parts);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(workers)) if (workers > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = std::min(part * rows, all_rows), last = std::min(first + rows, all_rows);
        if (first < last) work(first, last);
    }
}

Activations make_activations(const Product& p, int64_t tokens) {
    const auto columns = size_t(tokens * p.layout->padded), blocks = size_t(tokens * p.layout->blocks);
    Activations made{tokens, {}, {}, {}, {}, {}};
    made.sum.reset(new float[blocks]);
    if (p.exact) {
        made.values.reset(new float[columns]);
    } else {
        made.quantized.reset(new int8_t[columns]);
        made.scale.reset(new float[blocks]);
        made.quantized_sum.reset(new float[blocks]);
    }
    return made;
}

}  // namespace

Layout make_layout(int64_t rows, std::vector<Group> groups) {
    require(rows >= 1 && rows <= kMost, "rows out of range");
    require(!groups.empty() && int64_t(groups.size()) <= kMostGroups, "expected 1 to 16 column groups");
    Layout layout{rows, 0, std::move(groups), ceil_div(rows, kTileRows), 0, 0, 0};
    int64_t offset = 0;
    for (Group& group : layout.groups) {
        const bool known = group.bits == 1 || group.bits == 2 || group.bits == 4 || group.bits == 8;
        require(known, "expected codes of 1, 2, 4 or 8 bits");
        require(group.cols >= 1 && group.cols <= kMost, "columns of a group out of range");
        group.units = ceil_div(group.cols, group.columns_per_unit());
        group.first_column = layout.padded;
        group.first_block = layout.blocks;
        group.blocks = ceil_div(group.cols, kBlock);
        group.codes = offset;
        layout.cols += group.cols;
        layout.padded += group.padded();
        layout.blocks += group.blocks;
        offset += group.units * kUnitBytes;
    }
    for (Group& group : layout.groups) {
        group.scale = offset;
        group.mean = group.scale + 2 * kTileRows;
        group.zero = group.mean + (group.has_mean ? 2 * kTileRows : 0);
        offset = group.zero + (group.has_zero ? kTileRows : 0);
    }
    layout.tile_bytes = ceil_div(offset, 64) * 64;
    return layout;
}

void linear(const Kernel& kernel, const Product& p, int threads) {
    const Layout& layout = *p.layout;
    const int64_t bytes = layout.tiles * layout.tile_bytes * ceil_div(p.tokens, 4);
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>({threads, layout.tiles, bytes / kBytesPerThread}));
    const int64_t fitting = kChunkBytes / (layout.padded * (p.exact ? 4 : 1)) / kMaxTokens * kMaxTokens;
    const int64_t chunk = std::min(p.tokens, std::max<int64_t>(fitting, 2 * kMaxTokens));
    std::atomic<bool> sound{true};
    for (int64_t first = 0; first < p.tokens; first += chunk) {
        Activations activations = make_activations(p, std::min(chunk, p.tokens - first));
        const int64_t tiles = std::max<int64_t>(1, layout.tiles / (workers * 8)), parts = ceil_div(layout.tiles, tiles);
        const auto gather = [&](int64_t slot) {
            if (!kernel.gather(p, first + slot, 0, layout.blocks, activations, slot)) sound = false;
        };
        const auto multiply = [&](int64_t part) {
            const int64_t last = std::min(layout.tiles, (part + 1) * tiles);
            if (sound) kernel.multiply(p, activations, first, part * tiles, last);
        };
        if (workers == 1) {
            for (int64_t slot = 0; slot < activations.tokens; ++slot) gather(slot);
            if (sound) kernel.multiply(p, activations, first, 0, layout.tiles);
            continue;
        }
        // A few tokens are gathered faster than threads meet, the more so on a machine where they wait for a core.
#pragma omp parallel for schedule(static) num_threads(int(workers)) if (activations.tokens > kMaxTokens)
        for (int64_t slot = 0; slot < activations.tokens; ++slot) gather(slot);
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(workers))
        for (int64_t part = 0; part < parts; ++part) multiply(part);
    }
    require(sound, "the column order names an input channel that does not exist");
}

void dense(const Kernel& kernel, const DenseProduct& p, int threads) {
    const int64_t bytes = p.rows * p.cols * (p.type == Type::kFloat32 ? 4 : 2);
    in_parallel(p.rows, bytes, threads, 8, [&](int64_t first, int64_t last) { kernel.dense(p, first, last); });
}

void round_latents(const Kernel& kernel, const Latents& p, bool backward, int threads) {
    int64_t cols = 0;
    for (const LatentGroup& group : p.groups) {
        require(group.cols >= 1 && group.cols <= p.cols && group.count >= 2, "a group of latents is out of range");
        require(group.step == 1 || group.step == 2, "expected levels that are 1 or 2 apart");
        cols += group.cols;
    }
    require(cols == p.cols && p.cols <= kMost && p.rows <= kMost, "the groups do not make up the columns");
    std::vector<bool> taken(size_t(p.cols));
    for (int64_t c = 0; c < p.cols; ++c) {
        const int64_t place = p.columns[c];
        require(place >= 0 && place < p.cols && !taken[size_t(place)], "the columns are no permutation");
        taken[size_t(place)] = true;
    }
    const auto work = backward ? kernel.round_backward : kernel.round;
    in_parallel(p.rows, p.rows * p.cols * 4, threads, 4, [&](int64_t first, int64_t last) { work(p, first, last); });
}

void search_scales(const Kernel& kernel, const ScaleSearch& p, int threads) {
    require(p.rows >= 1 && p.group.cols >= 1 && p.candidates >= 1, "expected rows, columns and candidates");
    require(p.rows <= kMost && p.group.cols <= kMost && p.candidates <= kMost, "rows, columns or candidates out of range");
    require(p.group.count > 2 && (p.group.step == 1 || p.group.step == 2), "expected levels that are 1 or 2 apart, not signs");
    const int64_t bytes = p.rows * p.group.cols * 4 * p.candidates;
    in_parallel(p.rows, bytes, threads, 4, [&](int64_t first, int64_t last) { kernel.search(p, first, last); });
}

uint64_t read_memory(const uint64_t* words, int64_t count, int threads) {
    constexpr int64_t kLine = 8;  // words of a cache line
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (int64_t line = 0; line < count / kLine; ++line) {
        const uint64_t* place = words + line * kLine;
        __builtin_prefetch(place + 64 * kLine);
        for (int word = 0; word < kLine; ++word) sum += place[word];
    }
    return sum;
}

}  // namespace ptq161
