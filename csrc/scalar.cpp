// The specification: every product as a plain loop over columns and rows, on any processor.

#include <cmath>

#include "shared.h"

namespace ptq161 {
namespace {

inline int digit(const Group& group, const uint8_t* codes, int64_t column, int row) {
    const int64_t unit = column / group.columns_per_unit();
    const int place = int(column % group.columns_per_unit());
    const uint8_t byte = codes[unit * kUnitBytes + row * 4 + place % 4];
    return (byte >> (group.bits * (place / 4))) & ((1 << group.bits) - 1);
}

void dot_int8(const Group& group, const uint8_t* codes, const int8_t* q, int64_t q_stride, const float* scale,
              int64_t scale_stride, int tokens, Rows* dot) {
    for (int t = 0; t < tokens; ++t) {
        for (int row = 0; row < kTileRows; ++row) {
            float sum = 0;
            for (int64_t block = 0; block < group.blocks; ++block) {
                const int64_t end = std::min((block + 1) * kBlock, group.cols);
                int32_t products = 0;
                for (int64_t column = block * kBlock; column < end; ++column) {
                    products += digit(group, codes, column, row) * q[t * q_stride + column];
                }
                sum += scale[t * scale_stride + block] * float(products);
            }
            dot[t][row] = sum;
        }
    }
}

void dot_exact(const Group& group, const uint8_t* codes, const float* u, int64_t stride, int tokens, Rows* dot) {
    for (int t = 0; t < tokens; ++t) {
        for (int row = 0; row < kTileRows; ++row) {
            double sum = 0;
            for (int64_t column = 0; column < group.cols; ++column) {
                sum += double(digit(group, codes, column, row)) * double(u[t * stride + column]);
            }
            dot[t][row] = float(sum);
        }
    }
}

void dense(const DenseProduct& p, int64_t first_row, int64_t last_row) {
    std::unique_ptr<float[]> x(new float[size_t(p.cols)]), weights(new float[size_t(p.cols)]);
    for (int64_t t = 0; t < p.tokens; ++t) {
        read_floats(p.x, p.type, t * p.cols, p.cols, x.get());
        for (int64_t row = first_row; row < last_row; ++row) {
            read_floats(p.weight, p.type, row * p.cols, p.cols, weights.get());
            double sum = 0;
            for (int64_t column = 0; column < p.cols; ++column) sum += double(weights[column]) * double(x[column]);
            const float rounded = float(sum);
            write_floats(&rounded, p.type, t * p.rows + row, 1, p.y);
        }
    }
}

float nearest(float ratio, const LatentGroup& group) {
    if (group.count == 2) return std::copysign(1.0f, ratio + 0.0f);
    float digit = std::nearbyint((ratio - group.lowest) / group.step);
    digit = digit < 0 ? 0 : digit;
    digit = digit > float(group.count - 1) ? float(group.count - 1) : digit;
    return digit * group.step + group.lowest;
}

// work(column, group, its scale) for every column of a row, in the order of the groups.
template <class Work>
void over_latents(const Latents& p, int64_t row, const Work& work) {
    int64_t column = 0;
    for (size_t g = 0; g < p.groups.size(); ++g) {
        const int64_t end = column + p.groups[g].cols;
        for (; column < end; ++column) work(column, g, p.scale[size_t(row) * p.groups.size() + g]);
    }
}

void round_rows(const Latents& p, int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
        over_latents(p, row, [&](int64_t column, size_t g, float scale) {
            const float value = nearest(p.latent[row * p.cols + column] / scale, p.groups[g]) * scale;
            write_floats(&value, p.type, row * p.cols + p.columns[column], 1, p.dense);
        });
    }
}

void round_rows_backward(const Latents& p, int64_t first_row, int64_t last_row) {
    std::vector<double> sums(p.groups.size());
    for (int64_t row = first_row; row < last_row; ++row) {
        std::fill(sums.begin(), sums.end(), 0.0);
        over_latents(p, row, [&](int64_t column, size_t g, float scale) {
            const LatentGroup& group = p.groups[g];
            const float ratio = p.latent[row * p.cols + column] / scale, edge = -group.lowest + group.step / 2;
            float gradient;
            read_floats(p.dense, p.type, row * p.cols + p.columns[column], 1, &gradient);
            sums[g] += double(gradient) * double(nearest(ratio, group));
            if (group.count > 2) {
                if (ratio <= -edge || ratio >= edge) gradient = 0;
                sums[g] -= double(gradient) * double(ratio);
            }
            p.to_latent[row * p.cols + column] = gradient;
        });
        for (size_t g = 0; g < sums.size(); ++g) p.to_scale[size_t(row) * sums.size() + g] = float(sums[g]);
    }
}

void search_rows(const ScaleSearch& p, int64_t first_row, int64_t last_row) {
    for (int64_t row = first_row; row < last_row; ++row) {
        const float* part = p.part + row * p.group.cols;
        double least = std::numeric_limits<double>::infinity();
        p.scale[row] = p.candidate[row * p.candidates];
        for (int64_t c = 0; c < p.candidates; ++c) {
            double along = 0, energy = 0, error = 0;
            for (int64_t column = 0; column < p.group.cols; ++column) {
                const double level = nearest(part[column] / p.candidate[row * p.candidates + c], p.group);
                along += p.importance[column] * level * part[column];
                energy += p.importance[column] * level * level;
            }
            const float scale = fitted_scale(float(along), float(energy), p.smallest);
            for (int64_t column = 0; column < p.group.cols; ++column) {
                const double off = double(nearest(part[column] / scale, p.group)) * scale - part[column];
                error += p.importance[column] * off * off;
            }
            if (error < least) least = error, p.scale[row] = scale;
        }
    }
}

bool always() { return true; }

}  // namespace

extern const Kernel kScalar;
const Kernel kScalar = {"scalar", always, gather, multiply<dot_int8, dot_exact>, dense, round_rows, round_rows_backward,
                        search_rows};

}  // namespace ptq161
