// What all kernels have in common, around the one function that each writes for itself: the dot products of one group.
//
// Everything here is in an unnamed namespace: each file compiles its own copy with its own instruction set, and the
// linker cannot hand the AVX-512 copy of a function to the scalar kernel.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

namespace ptq161 {
namespace {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The conversions are free of branches, so that compilers turn loops over them into vector code on every processor.

inline float half_to_float(uint16_t half) {
    const uint32_t magnitude = uint32_t(half & 0x7fffu) << 13;
    const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // 2^112: also right for subnormals
    const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
    return bits_to_float(float_to_bits(scaled) | special | uint32_t(half & 0x8000u) << 16);
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude + 0xc8000fffu + odd) >> 13;  // rebias by -112, round to nearest even
    const float magic = bits_to_float(126u << 23);                  // its last place is the smallest half's
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + magic) - (126u << 23);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return uint16_t((magnitude >= (143u << 23) ? special : finite) | sign >> 16);
}

inline float bfloat16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

inline void read_floats(const void* source, Type type, int64_t offset, int64_t count, float* out) {
    const auto* halves = static_cast<const uint16_t*>(source) + offset;
    switch (type) {
        case Type::kFloat32:
            std::memcpy(out, static_cast<const float*>(source) + offset, size_t(count) * sizeof(float));
            break;
        case Type::kBFloat16:
            for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(halves[i]);
            break;
        case Type::kFloat16:
            for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
            break;
    }
}

inline void write_floats(const float* values, Type type, int64_t offset, int64_t count, void* out) {
    auto* halves = static_cast<uint16_t*>(out) + offset;
    switch (type) {
        case Type::kFloat32:
            std::memcpy(static_cast<float*>(out) + offset, values, size_t(count) * sizeof(float));
            break;
        case Type::kBFloat16:
            for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bfloat16(values[i]);
            break;
        case Type::kFloat16:
            for (int64_t i = 0; i < count; ++i) halves[i] = float_to_half(values[i]);
            break;
    }
}

// One block of u = col * x in the order of the groups; `count` columns from `start`, then zeros up to kBlock.
inline bool gather_block(const Product& p, const float* x, int64_t start, int64_t count, float* u) {
    if (p.order == nullptr) {
        std::memcpy(u, x + start, size_t(count) * sizeof(float));
    } else {
        const int32_t* order = p.order + start;
        uint32_t largest = 0;
        for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint32_t(order[i]));
        if (largest >= uint64_t(p.layout->cols)) return false;
        for (int64_t i = 0; i < count; ++i) u[i] = x[order[i]];
    }
    if (p.col != nullptr) {
        for (int64_t i = 0; i < count; ++i) u[i] *= half_to_float(p.col[start + i]);
    }
    std::fill(u + count, u + kBlock, 0.0f);
    return true;
}

// The best scale for given levels: sums of weight times level, and of squared levels, both by importance.
inline float fitted_scale(float along, float energy, float smallest) {
    return std::max(along / std::max(energy, std::numeric_limits<float>::min()), smallest);
}

inline float block_sum(const float* u) {
    float lanes[16] = {};
    for (int i = 0; i < kBlock; i += 16) {
        for (int lane = 0; lane < 16; ++lane) lanes[lane] += u[i + lane];
    }
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// Rounds a block to int8 in -127..127, writes the first `count` and the sum of all; returns the scale.
// A block with infinities or NaNs becomes zeros with scale NaN: what it touches is NaN, as it would be in float.
inline float quantize_block(const float* u, int64_t count, int8_t* q, int32_t* sum) {
    uint32_t largest = 0;  // positive floats compare like their bits
    for (int i = 0; i < kBlock; ++i) largest = std::max(largest, float_to_bits(u[i]) & 0x7fffffffu);
    // Below 2^-100 the reciprocal would be infinite, and such a block is zero for any purpose.
    const bool finite = largest < 0x7f800000u, used = finite && largest > (27u << 23);
    const float top = used ? bits_to_float(largest) : 1.0f, reciprocal = used ? 127.0f / top : 0.0f;
    int8_t rounded[kBlock];
    int32_t total = 0;
    if (used) {
        for (int i = 0; i < kBlock; ++i) {
            // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
            const int32_t value = int32_t(float_to_bits(u[i] * reciprocal + 12582912.0f) - 0x4b400000u);
            rounded[i] = int8_t(value);
            total += value;
        }
    } else {
        std::fill(rounded, rounded + kBlock, int8_t(0));
    }
    std::memcpy(q, rounded, size_t(count));
    *sum = total;
    return used ? top / 127.0f : (finite ? 0.0f : bits_to_float(0x7fc00000u));
}

bool gather(const Product& p, int64_t token, int64_t first_block, int64_t last_block, Activations& out, int64_t slot) {
    const Layout& layout = *p.layout;
    std::unique_ptr<float[]> converted;
    const float* x = static_cast<const float*>(p.x) + token * layout.cols;
    if (p.type != Type::kFloat32) {
        converted.reset(new float[size_t(layout.cols)]);
        read_floats(p.x, p.type, token * layout.cols, layout.cols, converted.get());
        x = converted.get();
    }
    int64_t group_start = 0;
    for (const Group& group : layout.groups) {
        const int64_t first = std::max<int64_t>(first_block - group.first_block, 0);
        const int64_t last = std::min<int64_t>(last_block - group.first_block, group.blocks);
        for (int64_t block = first; block < last; ++block) {
            float u[kBlock];
            const int64_t start = block * kBlock, count = std::min<int64_t>(kBlock, group.cols - start);
            if (!gather_block(p, x, group_start + start, count, u)) return false;
            const int64_t stored = std::min<int64_t>(kBlock, group.padded() - start);
            const int64_t place = slot * layout.padded + group.first_column + start;
            const int64_t entry = slot * layout.blocks + group.first_block + block;
            out.sum[entry] = block_sum(u);
            if (p.exact) {
                std::memcpy(&out.values[place], u, size_t(stored) * sizeof(float));
                continue;
            }
            int32_t sum;
            out.scale[entry] = quantize_block(u, stored, &out.quantized[place], &sum);
            out.quantized_sum[entry] = out.scale[entry] * float(sum);
        }
        group_start += group.cols;
    }
    return true;
}

using Rows = float[kTileRows];

// The dot products of one group in one tile with 1..kMaxTokens tokens: dot[t][r] = sum over blocks of s * <d, q>.
// `q` and `scale` are those of the group's first column and block in the first token; strides lead to the next token.
using Dot = void (*)(const Group&, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
                     int64_t scale_stride, int tokens, Rows* dot);
// The same in float: dot[t][r] = <d, u>.
using ExactDot = void (*)(const Group&, const uint8_t* codes, const float* u, int64_t stride, int tokens, Rows* dot);

// Sums over a group's blocks, per token: what zero points and means are multiplied by.
struct GroupSums {
    float levels, values;
};

inline std::unique_ptr<GroupSums[]> group_sums(const Product& p, const Activations& in) {
    const Layout& layout = *p.layout;
    std::unique_ptr<GroupSums[]> sums(new GroupSums[size_t(in.tokens) * layout.groups.size()]);
    GroupSums* next = sums.get();
    for (int64_t t = 0; t < in.tokens; ++t) {
        for (const Group& group : layout.groups) {
            const int64_t entry = t * layout.blocks + group.first_block;
            double values = 0, levels = 0;
            for (int64_t block = 0; block < group.blocks; ++block) {
                values += double(in.sum[entry + block]);
                if (!p.exact) levels += double(in.quantized_sum[entry + block]);
            }
            *next++ = {float(p.exact ? values : levels), float(values)};
        }
    }
    return sums;
}

// Adds one group's part to y: scale * (step * dot + (lowest - zero) * sum of rounded values) + mean * sum of values.
inline void add_group(const Group& group, const uint8_t* tile, const Rows* dot, const GroupSums* sums, size_t stride,
                      int tokens, Rows* y) {
    uint16_t halves[kTileRows];
    Rows scale, offset, mean;
    std::memcpy(halves, tile + group.scale, sizeof halves);
    for (int r = 0; r < kTileRows; ++r) scale[r] = half_to_float(halves[r]);
    for (int r = 0; r < kTileRows; ++r) offset[r] = group.lowest;
    if (group.has_zero) {
        int8_t zero[kTileRows];
        std::memcpy(zero, tile + group.zero, sizeof zero);
        for (int r = 0; r < kTileRows; ++r) offset[r] -= float(zero[r]);
    }
    for (int t = 0; t < tokens; ++t) {
        const float levels = sums[size_t(t) * stride].levels;
        for (int r = 0; r < kTileRows; ++r) y[t][r] += scale[r] * (group.step * dot[t][r] + offset[r] * levels);
    }
    if (!group.has_mean) return;
    std::memcpy(halves, tile + group.mean, sizeof halves);
    for (int r = 0; r < kTileRows; ++r) mean[r] = half_to_float(halves[r]);
    for (int t = 0; t < tokens; ++t) {
        const float values = sums[size_t(t) * stride].values;
        for (int r = 0; r < kTileRows; ++r) y[t][r] += mean[r] * values;
    }
}

// Adds the products of one tile with `tokens` tokens from `first` to y.
template <Dot dot_int8, ExactDot dot_exact>
void multiply_tile(const Product& p, const Activations& in, const GroupSums* sums, const uint8_t* tile, int64_t first,
                   int tokens, Rows* y) {
    const Layout& layout = *p.layout;
    const size_t groups = layout.groups.size();
    for (size_t g = 0; g < groups; ++g) {
        const Group& group = layout.groups[g];
        Rows dot[kMaxTokens];
        const int64_t column = first * layout.padded + group.first_column;
        const int64_t entry = first * layout.blocks + group.first_block;
        if (p.exact) {
            dot_exact(group, tile + group.codes, &in.values[column], layout.padded, tokens, dot);
        } else {
            dot_int8(group, tile + group.codes, &in.quantized[column], layout.padded, &in.scale[entry], layout.blocks,
                     tokens, dot);
        }
        add_group(group, tile, dot, sums + size_t(first) * groups + g, groups, tokens, y);
    }
}

template <Dot dot_int8, ExactDot dot_exact>
void multiply(const Product& p, const Activations& in, int64_t first_token, int64_t first_tile, int64_t last_tile) {
    const Layout& layout = *p.layout;
    const std::unique_ptr<GroupSums[]> sums = group_sums(p, in);
    for (int64_t index = first_tile; index < last_tile; ++index) {
        const uint8_t* tile = p.tiles + index * layout.tile_bytes;
        const int64_t row = index * kTileRows, rows = std::min<int64_t>(kTileRows, layout.rows - row);
        Rows bias = {};
        if (p.bias != nullptr) read_floats(p.bias, p.bias_type, row, rows, bias);
        for (int64_t first = 0; first < in.tokens; first += kMaxTokens) {
            const int tokens = int(std::min<int64_t>(kMaxTokens, in.tokens - first));
            Rows y[kMaxTokens];
            for (int t = 0; t < tokens; ++t) std::memcpy(y[t], bias, sizeof bias);
            multiply_tile<dot_int8, dot_exact>(p, in, sums.get(), tile, first, tokens, y);
            for (int t = 0; t < tokens; ++t) {
                write_floats(y[t], p.type, (first_token + first + t) * layout.rows + row, rows, p.y);
            }
        }
    }
}

}  // namespace
}  // namespace ptq161
