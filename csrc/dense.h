// A dense matrix times few tokens, for vector units: what a head that is not packed costs is reading it from memory.
//
// Rows are read one behind the other, as they lie; 2 * kLanes columns at a time. A 32-bit word holds two bfloat16 weights,
// which become floats by a shift and a mask: columns of even and of odd number. Activations are put in that order once,
// so that nothing is moved between lanes.
//
// Registers are half as wide as AVX-512's at most: in a mapped file weights start anywhere, and of wider loads every one
// would touch two cache lines, which costs a third of the time.
#pragma once

#include "exact.h"

namespace ptq161 {
namespace {

constexpr int kLanes = kWidth < 8 ? kWidth : 8;  // kWidth is the including file's: floats of its vector registers
constexpr int kStep = 2 * kLanes;                // columns
constexpr int64_t kDenseAhead = 4096;            // bytes, as in avx512.cpp

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t LaneWords __attribute__((vector_size(4 * kLanes)));
// As they lie in memory: at any address, whatever else the bytes are.
typedef float AnyLanes __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef uint32_t AnyLaneWords __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));

struct Pair {
    Lanes first, second;
};

inline Pair read_pair(const float* values) {
    return {*reinterpret_cast<const AnyLanes*>(values), *reinterpret_cast<const AnyLanes*>(values + kLanes)};
}

inline Pair read_pair(const uint16_t* halves) {
    const LaneWords words = *reinterpret_cast<const AnyLaneWords*>(halves);
    return {(Lanes)(words << 16), (Lanes)(words & 0xffff0000u)};
}

template <class Weight>
inline void fetch_ahead(const Weight* weights) {
    const char* place = reinterpret_cast<const char*>(weights) + kDenseAhead;
    for (int byte = 0; byte < kStep * int(sizeof(Weight)); byte += 64) __builtin_prefetch(place + byte);
}

// One row with kTokens tokens; several sums for each, as one would wait for its own last addition.
template <int kTokens, class Weight>
inline void dense_row(const Weight* row, int64_t cols, const float* x, int64_t stride, float* out) {
    constexpr int kAtOnce = kTokens == 1 ? 4 : 2;
    Lanes sums[kTokens][kAtOnce];
#pragma GCC unroll 8
    for (int sum = 0; sum < kTokens * kAtOnce; ++sum) sums[sum / kAtOnce][sum % kAtOnce] = Lanes{};
    int64_t column = 0;
    for (; column + kAtOnce * kStep <= cols; column += kAtOnce * kStep) {
#pragma GCC unroll 4
        for (int place = 0; place < kAtOnce; ++place) {
            const int64_t start = column + place * kStep;
            const Pair weights = read_pair(row + start);
            fetch_ahead(row + start);
#pragma GCC unroll 4
            for (int t = 0; t < kTokens; ++t) {
                const Pair values = read_pair(x + t * stride + start);
                sums[t][place] += weights.first * values.first;
                sums[t][place] += weights.second * values.second;
            }
        }
    }
    for (; column < cols; column += kStep) {
        Weight rest[kStep] = {};
        std::memcpy(rest, row + column, size_t(std::min<int64_t>(kStep, cols - column)) * sizeof(Weight));
        const Pair weights = read_pair(rest);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            const Pair values = read_pair(x + t * stride + column);
            sums[t][0] += weights.first * values.first + weights.second * values.second;
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
        Lanes sum = sums[t][0];
#pragma GCC unroll 4
        for (int place = 1; place < kAtOnce; ++place) sum += sums[t][place];
        out[t * kTileRows] = lane_sum(sum);
    }
}

template <int kTokens, class Weight>
__attribute__((noinline)) void dense_rows(const DenseProduct& p, const float* x, int64_t stride, int64_t token,
                                          int64_t first_row, int64_t last_row) {
    const Weight* weight = static_cast<const Weight*>(p.weight);
    for (int64_t start = first_row; start < last_row; start += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, last_row - start);
        Rows y[kTokens];
        for (int64_t r = 0; r < rows; ++r) {
            dense_row<kTokens>(weight + (start + r) * p.cols, p.cols, x + token * stride, stride, y[0] + r);
        }
        for (int t = 0; t < kTokens; ++t) write_floats(y[t], p.type, (token + t) * p.rows + start, rows, p.y);
    }
}

template <class Weight>
void dense_type(const DenseProduct& p, int64_t first_row, int64_t last_row) {
    const int64_t stride = (p.cols + kStep - 1) / kStep * kStep;
    const std::unique_ptr<float[]> plain(new float[size_t(stride)]()), room(new float[size_t(p.tokens * stride + 16)]);
    float* x = room.get() + (64 - reinterpret_cast<uintptr_t>(room.get()) % 64) / sizeof(float);  // from a cache line on
    for (int64_t t = 0; t < p.tokens; ++t) {
        read_floats(p.x, p.type, t * p.cols, p.cols, plain.get());
        for (int64_t column = 0; column < stride; ++column) {
            const int64_t place = column % kStep, start = column - place;
            const bool halves = sizeof(Weight) == 2;
            x[t * stride + start + (halves ? place % 2 * kLanes + place / 2 : place)] = plain[size_t(column)];
        }
    }
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) dense_rows<4, Weight>(p, x, stride, t, first_row, last_row);
    if (p.tokens - t == 3) dense_rows<3, Weight>(p, x, stride, t, first_row, last_row);
    if (p.tokens - t == 2) dense_rows<2, Weight>(p, x, stride, t, first_row, last_row);
    if (p.tokens - t == 1) dense_rows<1, Weight>(p, x, stride, t, first_row, last_row);
}

void dense(const DenseProduct& p, int64_t first_row, int64_t last_row) {
    p.type == Type::kFloat32 ? dense_type<float>(p, first_row, last_row) : dense_type<uint16_t>(p, first_row, last_row);
}

}  // namespace
}  // namespace ptq161
