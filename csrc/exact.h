// The exact dot products for vector units: digits become floats, 32 rows at a time.
//
// Written with the compilers' vector types, so the files that include it get their own instruction set's code: one lane
// is one row, as everywhere; a column costs shift, and, convert, and one multiply-add per token.
// kWidth, the floats of a vector register, is defined by the including file.
#pragma once

#include "shared.h"

namespace ptq161 {
namespace {

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

template <class Vector>
inline float lane_sum(Vector values) {
    float lanes[sizeof(Vector) / sizeof(float)];
    std::memcpy(lanes, &values, sizeof lanes);
    for (size_t width = sizeof(Vector) / sizeof(float) / 2; width > 0; width /= 2) {
        for (size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// `kParts` registers of rows from `codes` on, summed in float32 over a block, and over blocks into `total`.
// Not inlined, and unrolled by hand: GCC 12 then keeps the sums in registers.
template <int kBits, int kTokens, int kParts>
__attribute__((noinline)) void exact_rows(const Group& group, const uint8_t* codes, const float* u, int64_t stride, float* out) {
    constexpr int kColumns = 32 / kBits;
    Floats total[kTokens][kParts] = {};
    for (int64_t first = 0; first < group.units; first += kBlock / kColumns) {
        Floats sum[kTokens][kParts] = {};
        const int64_t last = std::min<int64_t>(group.units, first + kBlock / kColumns);
        for (int64_t unit = first; unit < last; ++unit) {
            Words words[kParts];
            std::memcpy(words, codes + unit * kUnitBytes, sizeof words);
#pragma GCC unroll 32
            for (int column = 0; column < kColumns; ++column) {
                const int shift = 8 * (column % 4) + kBits * (column / 4);
#pragma GCC unroll 2
                for (int part = 0; part < kParts; ++part) {
                    const Words digits = (words[part] >> shift) & ((1u << kBits) - 1u);
                    const Floats values = __builtin_convertvector((Ints)digits, Floats);
#pragma GCC unroll 4
                    for (int t = 0; t < kTokens; ++t) sum[t][part] += values * u[t * stride + unit * kColumns + column];
                }
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) total[t][part] += sum[t][part];
        }
    }
    for (int t = 0; t < kTokens; ++t) std::memcpy(out + t * kTileRows, total[t], sizeof total[t]);
}

template <int kBits, int kTokens>
inline void exact_tokens(const Group& group, const uint8_t* codes, const float* u, int64_t stride, Rows* dot) {
    constexpr int kParts = kTileRows / kWidth > 2 ? 2 : kTileRows / kWidth;  // more would not fit into registers
    for (int row = 0; row < kTileRows; row += kParts * kWidth) {
        exact_rows<kBits, kTokens, kParts>(group, codes + 4 * row, u, stride, dot[0] + row);
    }
}

template <int kBits>
inline void exact_bits(const Group& group, const uint8_t* codes, const float* u, int64_t stride, int tokens, Rows* dot) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) exact_tokens<kBits, 4>(group, codes, u + t * stride, stride, dot + t);
    for (; t < tokens; ++t) exact_tokens<kBits, 1>(group, codes, u + t * stride, stride, dot + t);
}

void dot_exact(const Group& group, const uint8_t* codes, const float* u, int64_t stride, int tokens, Rows* dot) {
    switch (group.bits) {
        case 1: return exact_bits<1>(group, codes, u, stride, tokens, dot);
        case 2: return exact_bits<2>(group, codes, u, stride, tokens, dot);
        case 4: return exact_bits<4>(group, codes, u, stride, tokens, dot);
        default: return exact_bits<8>(group, codes, u, stride, tokens, dot);
    }
}

}  // namespace
}  // namespace ptq161
