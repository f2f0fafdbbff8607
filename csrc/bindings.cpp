// The Python module ptq161.kernels._native: sizes are checked here, everything about tensors in kernels/cpu.py.
//
// Tensors come as (address, number of elements), because six arrays as nb::ndarray cost more than a small product.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "kernels.h"

namespace nb = nanobind;
using namespace ptq161;

namespace {

constexpr int64_t kMostTokens = int64_t(1) << 32, kMostRows = int64_t(1) << 28;

using Array = std::tuple<uintptr_t, int64_t>;
using GroupTuple = std::tuple<int, int64_t, float, float, bool, bool>;

Layout layout_of(int64_t rows, const std::vector<GroupTuple>& described) {
    std::vector<Group> groups;
    for (const auto& [bits, cols, lowest, step, has_zero, has_mean] : described) {
        Group group{};
        group.bits = bits, group.cols = cols, group.lowest = lowest, group.step = step;
        group.has_zero = has_zero, group.has_mean = has_mean;
        groups.push_back(group);
    }
    return make_layout(rows, std::move(groups));
}

// The array's address, once it is known to hold `expected` elements; null for an optional array that is (0, 0).
template <class Element>
Element* checked(const char* name, const Array& array, int64_t expected, bool optional = false) {
    const auto [address, count] = array;
    if (optional && address == 0 && count == 0) return nullptr;
    if (count != expected || (address == 0 && count != 0) || address % alignof(Element) != 0) {
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(count) + " elements, expected " +
                                    std::to_string(expected) + " at an aligned address");
    }
    return reinterpret_cast<Element*>(address);
}

size_t item_size(Type type) { return type == Type::kFloat32 ? 4 : 2; }

Type type_of(int number) {
    if (number < 0 || number > 2) throw std::invalid_argument("expected type 0 (float32), 1 (bfloat16) or 2 (float16)");
    return Type(number);
}

const Kernel& kernel_named(const std::string& name) {
    for (const Kernel* kernel : available_kernels()) {
        if (name == kernel->name) return *kernel;
    }
    throw std::invalid_argument("this processor has no kernel " + name);
}

void call(const Layout& layout, const std::string& name, int64_t tokens, int type, const Array& x, const Array& y,
          const Array& tiles, const Array& order, const Array& col, const Array& bias, int bias_type, bool exact,
          int threads) {
    if (tokens < 0 || tokens > kMostTokens) throw std::invalid_argument("tokens out of range");
    if (threads < 1) throw std::invalid_argument("expected at least one thread");
    Product product{};
    product.layout = &layout;
    product.type = type_of(type), product.bias_type = type_of(bias_type);
    product.tokens = tokens, product.exact = exact;
    product.x = checked<uint16_t>("x", x, tokens * layout.cols);
    product.y = checked<uint16_t>("y", y, tokens * layout.rows);
    product.tiles = checked<uint8_t>("tiles", tiles, layout.tiles * layout.tile_bytes);
    product.order = checked<int32_t>("order", order, layout.cols, true);
    product.col = checked<uint16_t>("col", col, layout.cols, true);
    product.bias = checked<uint16_t>("bias", bias, layout.rows, true);
    if (uintptr_t(product.x) % item_size(product.type) != 0 || uintptr_t(product.y) % item_size(product.type) != 0 ||
        uintptr_t(product.bias) % item_size(product.bias_type) != 0) {
        throw std::invalid_argument("x, y or bias is not aligned to its elements");
    }
    const Kernel& kernel = kernel_named(name);
    nb::gil_scoped_release released;
    linear(kernel, product, threads);
}

void call_dense(const std::string& name, int64_t tokens, int64_t rows, int64_t cols, int type, const Array& x,
                const Array& y, const Array& weight, int threads) {
    if (tokens < 0 || tokens > kMostTokens) throw std::invalid_argument("tokens out of range");
    if (rows < 1 || rows > kMostRows || cols < 1 || cols > kMostRows) throw std::invalid_argument("rows or cols out of range");
    if (threads < 1) throw std::invalid_argument("expected at least one thread");
    DenseProduct product{nullptr, nullptr, nullptr, type_of(type), tokens, rows, cols};
    if (product.type == Type::kFloat16) throw std::invalid_argument("expected float32 or bfloat16");
    product.x = checked<uint16_t>("x", x, tokens * cols);
    product.y = checked<uint16_t>("y", y, tokens * rows);
    product.weight = checked<uint16_t>("weight", weight, rows * cols);
    const uintptr_t size = item_size(product.type);
    if (uintptr_t(product.x) % size != 0 || uintptr_t(product.y) % size != 0 || uintptr_t(product.weight) % size != 0) {
        throw std::invalid_argument("x, y or weight is not aligned to its elements");
    }
    const Kernel& kernel = kernel_named(name);
    nb::gil_scoped_release released;
    dense(kernel, product, threads);
}

using LatentGroupTuple = std::tuple<int64_t, int, float, float>;

template <bool backward>
void call_rounding(const std::string& name, int64_t rows, int64_t cols, const std::vector<LatentGroupTuple>& described,
                   int type, const Array& latent, const Array& scale, const Array& columns, const Array& dense,
                   const Array& to_latent, const Array& to_scale, int threads) {
    if (rows < 1 || rows > kMostRows || cols < 1 || cols > kMostRows) throw std::invalid_argument("rows or cols out of range");
    if (threads < 1) throw std::invalid_argument("expected at least one thread");
    Latents latents{};
    latents.rows = rows, latents.cols = cols, latents.type = type_of(type);
    if (latents.type == Type::kFloat16) throw std::invalid_argument("expected float32 or bfloat16");
    for (const auto& [group_cols, count, lowest, step] : described) {
        latents.groups.push_back({group_cols, count, lowest, step});
    }
    const auto scales = rows * int64_t(described.size());
    latents.latent = checked<float>("latent", latent, rows * cols);
    latents.scale = checked<float>("scale", scale, scales);
    latents.columns = checked<int64_t>("columns", columns, cols);
    latents.dense = checked<uint16_t>("dense", dense, rows * cols);
    if (uintptr_t(latents.dense) % item_size(latents.type) != 0) {
        throw std::invalid_argument("dense is not aligned to its elements");
    }
    latents.to_latent = checked<float>("to_latent", to_latent, backward ? rows * cols : 0, !backward);
    latents.to_scale = checked<float>("to_scale", to_scale, backward ? scales : 0, !backward);
    const Kernel& kernel = kernel_named(name);
    nb::gil_scoped_release released;
    round_latents(kernel, latents, backward, threads);
}

void call_search(const std::string& name, int64_t rows, const LatentGroupTuple& described, int64_t candidates,
                 float smallest, const Array& part, const Array& importance, const Array& candidate, const Array& scale,
                 int threads) {
    const auto [cols, count, lowest, step] = described;
    if (rows < 1 || rows > kMostRows || cols < 1 || cols > kMostRows) throw std::invalid_argument("rows or cols out of range");
    if (candidates < 1 || candidates > kMostRows) throw std::invalid_argument("candidates out of range");
    if (threads < 1) throw std::invalid_argument("expected at least one thread");
    ScaleSearch search{rows, candidates, {cols, count, lowest, step}, nullptr, nullptr, nullptr, smallest, nullptr};
    search.part = checked<float>("part", part, rows * cols);
    search.importance = checked<float>("importance", importance, cols);
    search.candidate = checked<float>("candidate", candidate, rows * candidates);
    search.scale = checked<float>("scale", scale, rows);
    const Kernel& kernel = kernel_named(name);
    nb::gil_scoped_release released;
    search_scales(kernel, search, threads);
}

// Codes of a group into tiles or back, once the sizes are known to fit.
template <bool to_tiles>
void move_codes(const Layout& layout, int64_t group, int levels, const Array& stored, const Array& tiles, int threads) {
    if (group < 0 || group >= int64_t(layout.groups.size())) throw std::invalid_argument("no such group");
    if (threads < 1) throw std::invalid_argument("expected at least one thread");
    auto* codes = checked<uint8_t>("stored", stored, layout.rows * stored_row_bytes(layout, group, levels));
    auto* units = checked<uint8_t>("tiles", tiles, layout.tiles * layout.tile_bytes);
    nb::gil_scoped_release released;
    if constexpr (to_tiles) {
        codes_to_tiles(layout, group, levels, codes, units, threads);
    } else {
        codes_from_tiles(layout, group, levels, units, codes, threads);
    }
}

}  // namespace

NB_MODULE(_native, module) {
    nb::set_leak_warnings(false);  // layouts are cached in Python until the process ends
    nb::class_<Layout>(module, "Layout")
        .def("__init__",
             [](Layout* self, int64_t rows, const std::vector<GroupTuple>& groups) {
                 new (self) Layout(layout_of(rows, groups));
             })
        .def_ro("tiles", &Layout::tiles)
        .def_ro("tile_bytes", &Layout::tile_bytes);
    module.def("kernels", [] {
        std::vector<std::string> names;
        for (const Kernel* kernel : available_kernels()) names.emplace_back(kernel->name);
        return names;
    });
    module.def("linear", &call);
    module.def("dense", &call_dense);
    module.def("round_latents", &call_rounding<false>);
    module.def("round_latents_backward", &call_rounding<true>);
    module.def("search_scales", &call_search);
    module.def("codes_to_tiles", &move_codes<true>);
    module.def("codes_from_tiles", &move_codes<false>);
    module.def("read_memory", [](const Array& array, int threads) {
        const auto* words = checked<const uint64_t>("array", array, std::max<int64_t>(std::get<1>(array), 0));
        if (threads < 1) throw std::invalid_argument("expected at least one thread");
        nb::gil_scoped_release released;
        return read_memory(words, std::get<1>(array), threads);
    });
}
