// Every kernel that runs here against double arithmetic on random weights, with tight buffers: what the sanitizers and
// qemu run (make sanitize). The Python tests compare with the reference through the op; this one needs no Python.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>

#include "kernels.h"

using namespace ptq161;

namespace {

uint16_t half_of(int exponent, int mantissa) { return uint16_t((exponent + 15) << 10 | mantissa); }
double value_of(uint16_t half) { return std::ldexp(1024 + (half & 1023), (half >> 10) - 25); }

// A random linear in tiles, and its dense weight in double, columns in the order of the groups.
struct Example {
    Layout layout;
    std::vector<uint8_t> tiles;
    std::vector<uint16_t> col;
    std::vector<double> dense;
};

Example make_example(int64_t rows, const std::vector<Group>& groups, std::mt19937& random) {
    Example made{make_layout(rows, groups), {}, {}, {}};
    const Layout& layout = made.layout;
    made.tiles.resize(size_t(layout.tiles * layout.tile_bytes));
    made.dense.resize(size_t(rows * layout.cols));
    for (int64_t c = 0; c < layout.cols; ++c) made.col.push_back(half_of(-int(random() % 2), int(random() % 1024)));
    for (int64_t row = 0; row < rows; ++row) {
        uint8_t* tile = &made.tiles[size_t(row / kTileRows * layout.tile_bytes)];
        const int64_t place = row % kTileRows;
        int64_t start = 0;
        for (const Group& g : layout.groups) {
            const uint16_t scale = half_of(-4, int(random() % 1024)), mean = half_of(-9, int(random() % 1024));
            const int8_t zero = int8_t(random() % 9);
            std::memcpy(tile + g.scale + 2 * place, &scale, 2);
            if (g.has_mean) std::memcpy(tile + g.mean + 2 * place, &mean, 2);
            if (g.has_zero) std::memcpy(tile + g.zero + place, &zero, 1);
            for (int64_t c = 0; c < g.cols; ++c) {
                const unsigned digit = random() & ((1u << g.bits) - 1);
                const int64_t unit = c / g.columns_per_unit(), k = c % g.columns_per_unit() / 4;
                tile[g.codes + unit * kUnitBytes + 4 * place + c % 4] |= uint8_t(digit << (g.bits * k));
                double value = (g.lowest + g.step * digit - (g.has_zero ? zero : 0)) * value_of(scale);
                value += g.has_mean ? value_of(mean) : 0;
                made.dense[size_t(row * layout.cols + start + c)] = value * value_of(made.col[size_t(start + c)]);
            }
            start += g.cols;
        }
    }
    return made;
}

// Of y, relative to what its terms would sum up to if their signs were random: a sum may cancel.
double relative_error(const Kernel& kernel, const Example& example, int64_t tokens, bool exact, int threads,
                      std::mt19937& random) {
    const Layout& layout = example.layout;
    std::normal_distribution<float> normal;
    std::vector<float> x(size_t(tokens * layout.cols)), y(size_t(tokens * layout.rows)), bias(size_t(layout.rows));
    for (float& value : x) value = normal(random);
    for (float& value : bias) value = normal(random);
    std::vector<int32_t> order(size_t(layout.cols));
    for (size_t c = 0; c < order.size(); ++c) order[c] = int32_t(order.size() - 1 - c);
    const Product product{&layout, example.tiles.data(), order.data(), example.col.data(), x.data(), y.data(),
                          Type::kFloat32, bias.data(), Type::kFloat32, tokens, exact};
    linear(kernel, product, threads);
    double wrong = 0, whole = 1e-30;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < layout.rows; ++row) {
            double sum = double(bias[size_t(row)]), squares = sum * sum;
            for (int64_t c = 0; c < layout.cols; ++c) {
                const float factor = x[size_t(t * layout.cols + order[size_t(c)])];
                const double term = example.dense[size_t(row * layout.cols + c)] * double(factor);
                sum += term, squares += term * term;
            }
            wrong += std::pow(double(y[size_t(t * layout.rows + row)]) - sum, 2);
            whole += squares;
        }
    }
    return std::sqrt(wrong / whole);
}

Group group_of(int bits, int64_t cols, float lowest, float step, bool has_zero, bool has_mean) {
    Group group{};
    group.bits = bits, group.cols = cols, group.lowest = lowest, group.step = step;
    group.has_zero = has_zero, group.has_mean = has_mean;
    return group;
}

// Whether codes of every width survive the way into tiles and back, each digit where kernels.h says; tight buffers.
bool codes_survive(int bits, int levels, int64_t rows, int64_t cols, std::mt19937& random) {
    const Layout layout = make_layout(rows, {group_of(4, 5, -15, 2, true, true), group_of(bits, cols, 0, 1, false, false)});
    const Group& group = layout.groups[1];
    int per_byte = 0;
    for (int capacity = levels; capacity <= 256 && per_byte < 8; capacity *= levels) ++per_byte;
    const int64_t bytes = stored_row_bytes(layout, 1, levels);
    std::vector<uint8_t> stored(size_t(rows * bytes)), back(stored.size()), digits(size_t(rows * cols));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = cols - 1; c >= 0; --c) {
            const auto digit = uint8_t(random() % unsigned(levels));
            digits[size_t(row * cols + c)] = digit;
            uint8_t& byte = stored[size_t(row * bytes + c / per_byte)];
            byte = uint8_t(byte * levels + digit);
        }
    }
    std::vector<uint8_t> tiles(size_t(layout.tiles * layout.tile_bytes));
    codes_to_tiles(layout, 1, levels, stored.data(), tiles.data(), 2);
    bool same = true;
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* codes = &tiles[size_t(row / kTileRows * layout.tile_bytes + group.codes)];
        for (int64_t c = 0; c < cols; ++c) {
            const int64_t unit = c / group.columns_per_unit(), k = c % group.columns_per_unit() / 4;
            const int byte = codes[unit * kUnitBytes + 4 * (row % kTileRows) + c % 4];
            same &= (byte >> (bits * k) & ((1 << bits) - 1)) == digits[size_t(row * cols + c)];
        }
    }
    codes_from_tiles(layout, 1, levels, tiles.data(), back.data(), 2);
    return same && back == stored && bytes == (cols + per_byte - 1) / per_byte;
}

// A dense weight in a buffer that ends with it, from an address that only its elements are aligned to.
double dense_error(const Kernel& kernel, Type type, int64_t rows, int64_t cols, int64_t tokens, int threads,
                   std::mt19937& random) {
    const size_t size = type == Type::kFloat32 ? 4 : 2, weights = size_t(rows * cols), inputs = size_t(tokens * cols);
    std::vector<uint8_t> memory((weights + 1) * size), x(inputs * size), y(size_t(tokens * rows) * size);
    // Small integers are exact in every type.
    const auto fill = [&](uint8_t* place, size_t count, std::vector<double>& values) {
        for (size_t i = 0; i < count; ++i) {
            const float value = float(int(random() % 17) - 8);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            const auto half = uint16_t(bits >> 16);
            size == 4 ? std::memcpy(place + 4 * i, &bits, 4) : std::memcpy(place + 2 * i, &half, 2);
            values.push_back(value);
        }
    };
    std::vector<double> weight, input;
    fill(memory.data() + size, weights, weight);
    fill(x.data(), inputs, input);
    dense(kernel, {memory.data() + size, x.data(), y.data(), type, tokens, rows, cols}, threads);
    double worst = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < rows; ++row) {
            double sum = 0;
            for (int64_t c = 0; c < cols; ++c) sum += weight[size_t(row * cols + c)] * input[size_t(t * cols + c)];
            const size_t place = size_t(t * rows + row);
            uint32_t bits = 0;
            std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 4 - size, y.data() + size * place, size);
            float value;
            std::memcpy(&value, &bits, 4);
            worst = std::max(worst, std::abs(double(value) - sum) / std::max(1.0, std::abs(sum)));
        }
    }
    return worst;
}

// Latents forward and backward by one kernel, in buffers without room to spare: what the scalar one gives, sums aside.
bool rounds_like_scalar(const Kernel& kernel, Type type, int64_t rows, int64_t cols, int threads, std::mt19937& random) {
    const size_t size = type == Type::kFloat32 ? 4 : 2, count = size_t(rows * cols);
    Latents p{};
    p.rows = rows, p.cols = cols, p.type = type;
    const LatentGroup widths[] = {{cols, 2, -1, 2}, {cols, 3, -1, 1}, {cols, 16, -15, 2}};
    for (int64_t left = cols; left > 0 && p.groups.size() < 3; left -= p.groups.back().cols) {
        p.groups.push_back(widths[p.groups.size()]);
        p.groups.back().cols = p.groups.size() == 3 ? left : (left + 1) / 2;
    }
    std::normal_distribution<float> normal;
    std::vector<float> latent(count), scale(size_t(rows) * p.groups.size());
    std::vector<int64_t> columns;
    for (float& value : latent) value = normal(random);
    for (float& value : scale) value = 0.1f + std::abs(normal(random));
    for (int64_t c = 0; c < cols; ++c) columns.push_back(c);
    std::shuffle(columns.begin(), columns.end(), random);
    std::vector<uint8_t> gradient(count * size);
    for (size_t i = 0; i < count; ++i) {
        const float value = float(int(random() % 17) - 8);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        std::memcpy(&gradient[i * size], reinterpret_cast<uint8_t*>(&bits) + 4 - size, size);
    }
    p.latent = latent.data(), p.scale = scale.data(), p.columns = columns.data();
    std::vector<uint8_t> dense[2];
    std::vector<float> to_latent[2], to_scale[2];
    for (int turn = 0; turn < 2; ++turn) {
        const Kernel& own = turn == 0 ? *available_kernels().back() : kernel;
        dense[turn].resize(count * size), to_latent[turn].resize(count), to_scale[turn].resize(scale.size());
        p.dense = dense[turn].data(), p.to_latent = to_latent[turn].data(), p.to_scale = to_scale[turn].data();
        round_latents(own, p, false, threads);
        p.dense = gradient.data();
        round_latents(own, p, true, threads);
    }
    bool close = dense[0] == dense[1] && to_latent[0] == to_latent[1];
    for (size_t i = 0; i < scale.size(); ++i) {
        close &= std::abs(to_scale[0][i] - to_scale[1][i]) <= 1e-3 * (1 + std::abs(to_scale[0][i]));
    }
    return close;
}

// Scales by one kernel, in buffers without room to spare: errors no larger than those of the scalar one's scales.
bool searches_like_scalar(const Kernel& kernel, const LatentGroup& group, int64_t rows, int threads, std::mt19937& random) {
    constexpr int64_t kCandidates = 7;
    std::normal_distribution<float> normal;
    std::vector<float> part(size_t(rows * group.cols)), importance(size_t(group.cols)), candidate(size_t(rows * kCandidates));
    for (float& value : part) value = normal(random);
    for (float& value : importance) value = std::abs(normal(random));
    for (float& value : candidate) value = 0.1f + std::abs(normal(random));
    ScaleSearch p{rows, kCandidates, group, part.data(), importance.data(), candidate.data(), 1e-7f, nullptr};
    std::vector<float> scale[2], error[2];
    for (int turn = 0; turn < 2; ++turn) {
        scale[turn].resize(size_t(rows)), p.scale = scale[turn].data();
        search_scales(turn == 0 ? *available_kernels().back() : kernel, p, threads);
        for (int64_t row = 0; row < rows; ++row) {
            double sum = 0;
            for (int64_t column = 0; column < group.cols; ++column) {
                const float value = part[size_t(row * group.cols + column)], own = scale[turn][size_t(row)];
                const float digit = std::nearbyint((value / own - group.lowest) / group.step);
                const float level = std::min(std::max(digit, 0.0f), float(group.count - 1)) * group.step + group.lowest;
                sum += double(importance[size_t(column)]) * std::pow(double(level) * own - value, 2);
            }
            error[turn].push_back(float(sum));
        }
    }
    for (size_t row = 0; row < size_t(rows); ++row) {
        if (!(std::abs(error[0][row] - error[1][row]) <= 1e-4f * (1 + error[0][row]))) return false;
    }
    return true;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    int passed = 0, failed = 0;
    const auto check = [&](bool good, const char* what) {
        good ? ++passed : ++failed;
        if (!good) std::printf("FAILED %s\n", what);
    };
    for (const Kernel* kernel : available_kernels()) {
        std::printf("%s\n", kernel->name);
        for (const int64_t rows : {1, 31, 33, 96}) {
            for (const int64_t cols : {1, 7, 33, 128, 129, 300}) {
                std::vector<Group> groups = {group_of(1, cols, -1, 2, false, true), group_of(2, 301 - cols, -1, 1, false, false),
                                             group_of(4, (cols + 2) / 3, -15, 2, true, false),
                                             group_of(8, (cols + 4) / 2, -127, 1, false, false)};
                const Example example = make_example(rows, groups, random);
                for (const int64_t tokens : {0, 1, 2, 3, 6, 7, 12, 13, 30}) {
                    for (const bool exact : {false, true}) {
                        const double error = relative_error(*kernel, example, tokens, exact, 1 + int(rows % 3), random);
                        char what[160];
                        std::snprintf(what, sizeof what, "%s: %d x %d, %d tokens, exact %d: error %g", kernel->name,
                                      int(rows), int(cols), int(tokens), int(exact), error);
                        // Few outputs are a small sample of rounding errors.
                        const double slack = 1 + 2 / std::sqrt(double(rows * std::max<int64_t>(tokens, 1)));
                        check(error <= (exact ? 1e-5 : 2e-2 * slack), what);
                    }
                }
            }
        }
    }
    for (const Kernel* kernel : available_kernels()) {
        for (const int64_t rows : {1, 33, 80}) {
            for (const int64_t cols : {1, 7, 16, 33, 64, 577}) {
                for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 9}) {
                    const int threads = 1 + int(rows % 3);
                    const double whole = dense_error(*kernel, Type::kFloat32, rows, cols, tokens, threads, random);
                    const double half = dense_error(*kernel, Type::kBFloat16, rows, cols, tokens, threads, random);
                    check(whole == 0, "a dense float32 weight of integers is multiplied exactly");
                    check(half <= 1.0 / 256, "a dense bfloat16 weight is multiplied as well as bfloat16 holds it");
                }
            }
        }
    }
    for (const Kernel* kernel : available_kernels()) {
        for (const int64_t rows : {1, 33, 200}) {
            for (const int64_t cols : {1, 2, 7, 16, 64, 97, 577}) {
                const int threads = 1 + int(rows % 3);
                check(rounds_like_scalar(*kernel, Type::kFloat32, rows, cols, threads, random), "latents to float32");
                check(rounds_like_scalar(*kernel, Type::kBFloat16, rows, cols, threads, random), "latents to bfloat16");
                check(searches_like_scalar(*kernel, {cols, 3, -1, 1}, rows, threads, random), "scales of ternary rows");
                check(searches_like_scalar(*kernel, {cols, 16, -15, 2}, rows, threads, random), "scales of 4-bit rows");
            }
        }
    }
    for (const int64_t rows : {1, 33}) {
        for (const int64_t cols : {1, 5, 16, 31, 129}) {
            check(codes_survive(1, 2, rows, cols, random), "1-bit codes survive");
            check(codes_survive(2, 3, rows, cols, random), "ternary codes survive");
            check(codes_survive(4, 16, rows, cols, random), "4-bit codes survive");
        }
    }
    try {
        stored_row_bytes(make_layout(5, {group_of(1, 8, 0, 1, false, false)}), 0, 3);
        check(false, "ternary codes in one bit are refused");
    } catch (const std::invalid_argument&) {
        check(true, "");
    }
    try {
        make_layout(5, {group_of(3, 8, 0, 1, false, false)});
        check(false, "a layout with 3 bits is refused");
    } catch (const std::invalid_argument&) {
        check(true, "");
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
