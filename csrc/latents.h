// Rounding of latent weights and the gradient back through it, for vector units (src/ptq161/latent.py has the formulas),
// and the search for the row scales that they start from (src/ptq161/mixed.py).
//
// A row is one pass over memory: latents come in the order of the groups, so that all of a group share a scale, and are
// rounded a register at a time into a buffer that stays in the first-level cache; from there they go to their natural
// places. Backward the same way round. torch needs a pass over memory for every operation, some twenty of them.
//
// Levels are computed by the operations of torch's reference, in its order: the same bits come out. Only the sums over
// a row, which are the scales' gradients, are added in another order. NaN stays NaN.
// kWidth, the floats of a vector register, is defined by the including file.
#pragma once

#include "exact.h"

namespace ptq161 {
namespace {

inline Floats all(float value) { return value - Floats{}; }

inline Floats chosen(Ints mask, Floats yes, Floats no) { return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no)); }

// Levels of kSigns or of lowest + step * d, d below count. Adding and taking off 3 * 2^22 rounds what is small to the
// nearest even integer, and digits are small once they are kept within their range; a comparison with NaN is false.
template <bool kSigns>
inline Floats nearest(Floats ratio, const LatentGroup& group) {
    if (kSigns) return (Floats)(((Ints)(ratio + all(0.0f)) & INT32_MIN) | (Ints)all(1.0f));
    const Floats lowest = all(group.lowest), step = all(group.step), most = all(float(group.count - 1));
    Floats digit = (ratio - lowest) * all(1 / group.step);  // exact: steps are powers of two
    digit = chosen(digit < Floats{}, Floats{}, digit);
    digit = chosen(digit > most, most, digit);
    const Floats big = all(12582912.0f);
    digit = (digit + big) - big;
    return digit * step + lowest;
}

// work(column, bytes) for every register of a group's columns; the last may be partly filled.
template <class Work>
inline void over_columns(int64_t cols, const Work& work) {
    int64_t column = 0;
    for (; column + kWidth <= cols; column += kWidth) work(column, std::integral_constant<size_t, 4 * kWidth>());
    if (column < cols) work(column, 4 * size_t(cols - column));
}

// The bits that a value is stored as, in 32-bit lanes: those of a float, or of a bfloat16 as float_to_bfloat16 has them.
template <class Bits>
inline Words stored_bits(Floats values) {
    const Words bits = (Words)values;
    if (sizeof(Bits) == 4) return bits;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Ints is_nan = (Ints)((bits & 0x7fffffffu) > 0x7f800000u);
    return (Words)chosen(is_nan, (Floats)((bits >> 16) | 0x40u), (Floats)rounded);
}

template <bool kSigns, class Bits>
inline void round_group(const LatentGroup& group, const float* latent, float scale, uint32_t* out) {
    const Floats scales = all(scale);
    over_columns(group.cols, [&](int64_t column, auto bytes) {
        Floats part = scales;
        std::memcpy(&part, latent + column, bytes);
        const Words words = stored_bits<Bits>(nearest<kSigns>(part / scales, group) * scales);
        std::memcpy(out + column, &words, bytes);
    });
}

template <class Bits>
void round_rows_to(const Latents& p, int64_t first_row, int64_t last_row) {
    const std::unique_ptr<uint32_t[]> grouped(new uint32_t[size_t(p.cols)]);
    for (int64_t row = first_row; row < last_row; ++row) {
        const float* latent = p.latent + row * p.cols;
        const float* scale = p.scale + row * int64_t(p.groups.size());
        uint32_t* place = grouped.get();
        for (const LatentGroup& group : p.groups) {
            group.count == 2 ? round_group<true, Bits>(group, latent, *scale, place)
                             : round_group<false, Bits>(group, latent, *scale, place);
            latent += group.cols, place += group.cols, ++scale;
        }
        Bits* dense = static_cast<Bits*>(p.dense) + row * p.cols;
        for (int64_t c = 0; c < p.cols; ++c) dense[p.columns[c]] = Bits(grouped[size_t(c)]);
    }
}

void round_rows(const Latents& p, int64_t first_row, int64_t last_row) {
    p.type == Type::kFloat32 ? round_rows_to<uint32_t>(p, first_row, last_row)
                             : round_rows_to<uint16_t>(p, first_row, last_row);
}

// Gradients at the latents, and the one at the group's scale, from those at the rounded weights of one row.
template <bool kSigns>
inline float group_gradients(const LatentGroup& group, const float* latent, float scale, const float* gradient,
                             float* to_latent) {
    const Floats scales = all(scale);
    // Beyond the outermost cell, half a step further than its level, moving a latent changes nothing.
    const Floats edge = all(-group.lowest + group.step / 2);
    Floats sum = {};
    over_columns(group.cols, [&](int64_t column, auto bytes) {
        Floats part = scales, arriving = {};
        std::memcpy(&part, latent + column, bytes);
        std::memcpy(&arriving, gradient + column, bytes);
        const Floats ratio = part / scales;
        sum += arriving * nearest<kSigns>(ratio, group);
        if (!kSigns) {
            arriving = chosen((ratio <= -edge) | (ratio >= edge), Floats{}, arriving);
            sum -= arriving * ratio;
        }
        std::memcpy(to_latent + column, &arriving, bytes);
    });
    return lane_sum(sum);
}

void round_rows_backward(const Latents& p, int64_t first_row, int64_t last_row) {
    const std::unique_ptr<float[]> natural(new float[size_t(p.cols)]), grouped(new float[size_t(p.cols)]);
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t start = row * p.cols, groups = int64_t(p.groups.size());
        read_floats(p.dense, p.type, start, p.cols, natural.get());
        for (int64_t c = 0; c < p.cols; ++c) grouped[size_t(c)] = natural[size_t(p.columns[c])];
        int64_t first = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const LatentGroup& group = p.groups[size_t(g)];
            const auto gradients = group.count == 2 ? group_gradients<true> : group_gradients<false>;
            p.to_scale[row * groups + g] = gradients(group, p.latent + start + first, p.scale[row * groups + g],
                                                     grouped.get() + first, p.to_latent + start + first);
            first += group.cols;
        }
    }
}

// work(weights, their importance) for every register of a row; what is missing in the last one counts for nothing.
template <class Work>
inline void over_weighted(const ScaleSearch& p, const float* part, const Work& work) {
    over_columns(p.group.cols, [&](int64_t column, auto bytes) {
        Floats values = {}, importance = {};
        std::memcpy(&values, part + column, bytes);
        std::memcpy(&importance, p.importance + column, bytes);
        work(values, importance);
    });
}

void search_rows(const ScaleSearch& p, int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
        const float* part = p.part + row * p.group.cols;
        const float* candidate = p.candidate + row * p.candidates;
        float least = std::numeric_limits<float>::infinity();
        p.scale[row] = candidate[0];
        for (int64_t c = 0; c < p.candidates; ++c) {
            Floats along = {}, energy = {};
            over_weighted(p, part, [&](Floats values, Floats importance) {
                const Floats levels = nearest<false>(values / all(candidate[c]), p.group);
                along += importance * levels * values;
                energy += importance * levels * levels;
            });
            const float scale = fitted_scale(lane_sum(along), lane_sum(energy), p.smallest);
            Floats error = {};
            over_weighted(p, part, [&](Floats values, Floats importance) {
                const Floats off = nearest<false>(values / all(scale), p.group) * all(scale) - values;
                error += importance * off * off;
            });
            const float sum = lane_sum(error);
            if (sum < least) least = sum, p.scale[row] = scale;
        }
    }
}

}  // namespace
}  // namespace ptq161
