// What a kernel is, and the weight that all of them read.
//
// In memory a packed linear is one array of tiles (src/ptq161/kernels/tiles.py makes it from the stored tensors). A tile
// holds 32 rows. Its bytes are, group after group, the codes; then, group after group, the row vectors:
//
//     codes  [unit][row 0..31][4 bytes]   a unit is the 32 bits of codes that a row has there: 32, 16, 8 or 4 columns
//                                         at 1, 2, 4 or 8 bits. Column 4 * k + j of the unit is in byte j, at bit bits * k.
//     scale  float16 [32]                 then mean, float16 [32], and zero, int8 [32], where the group has them
//
// padded with zeros to whole units, rows and 64 bytes. So one 32-bit lane of a vector register is one row, `(w >> bits *
// k) & mask` are four columns of every row, and an instruction that multiplies four bytes by four (vpdpbusd, sdot) adds
// them up: no shuffles, no sums across lanes, one sequential stream of memory, the same for one token and for hundreds.
//
// Activations are gathered into the order of the groups, multiplied by the column scale (u = col * x), and in int8 mode
// rounded in blocks of 128 columns, each with a scale s of its own (u is about s * q). With levels lowest + step * d:
//
//     y = sum over groups of  scale * (step * sum(s * <d, q>) + (lowest - zero) * sum(s * q)) + mean * sum(u)
//
// where the second sum takes the rounded values on purpose: then what rounding does to a weight is its level times the
// error, not its digit times the error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptq161 {

constexpr int kTileRows = 32;
constexpr int kBlock = 128;         // columns that share one activation scale; a multiple of every unit
constexpr int kUnitBytes = 4 * kTileRows;
constexpr int kMaxTokens = 12;      // that one call of a kernel's inner function works on at once

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A column group. The first six members describe it, the others follow (make_layout).
struct Group {
    int bits;      // of a code in memory: 1, 2, 4 or 8
    int64_t cols;  // input channels
    float lowest, step;
    bool has_zero, has_mean;

    int64_t units;         // of codes in a row, the last one padded
    int64_t first_column;  // among the padded columns of all groups
    int64_t first_block, blocks;
    int64_t codes, scale, mean, zero;  // byte offsets in a tile

    int64_t columns_per_unit() const { return 32 / bits; }
    int64_t padded() const { return units * columns_per_unit(); }
};

struct Layout {
    int64_t rows, cols;
    std::vector<Group> groups;
    int64_t tiles, tile_bytes;
    int64_t padded, blocks;  // columns and blocks of one token's activations
};

// Fills in what follows from rows and the groups' first six members. Throws std::invalid_argument.
Layout make_layout(int64_t rows, std::vector<Group> groups);

// Activations of some tokens, ready to be multiplied. Either `quantized` and `quantized_sum` (int8 mode) or `values`.
struct Activations {
    int64_t tokens;
    std::unique_ptr<int8_t[]> quantized;     // [tokens][padded]; padding is zero
    std::unique_ptr<float[]> values;         // [tokens][padded]
    std::unique_ptr<float[]> scale;          // [tokens][blocks]
    std::unique_ptr<float[]> sum;            // [tokens][blocks]: of u
    std::unique_ptr<float[]> quantized_sum;  // [tokens][blocks]: of s * q
};

// One product: y (tokens, rows) = x (tokens, cols) @ W.T + bias. Pointers may be null where the comment says so.
struct Product {
    const Layout* layout;
    const uint8_t* tiles;
    const int32_t* order;  // [cols] input channel of each column, in the order of the groups; null: as they are
    const uint16_t* col;   // [cols] float16 column scale in the order of the groups; null: ones
    const void* x;         // [tokens][cols] of `type`
    void* y;               // [tokens][rows] of `type`
    Type type;
    const void* bias;  // [rows] of `bias_type`; null: none
    Type bias_type;
    int64_t tokens;
    bool exact;  // activations stay float32
};

// y (tokens, rows) = x (tokens, cols) @ W.T with a dense weight; all three of `type`, float32 or bfloat16.
struct DenseProduct {
    const void* weight;  // [rows][cols]
    const void* x;       // [tokens][cols]
    void* y;             // [tokens][rows]
    Type type;
    int64_t tokens, rows, cols;
};

// Latent weights on their way to a dense weight, or its gradient on its way back (latents.h). `dense` is written forward
// and read backward, when it holds the gradient; to_latent and to_scale are written backward.
struct LatentGroup {
    int64_t cols;
    int count;  // levels: lowest, lowest + step, ...
    float lowest, step;
};

struct Latents {
    int64_t rows, cols;
    std::vector<LatentGroup> groups;
    const float* latent;     // [rows][cols] in the order of the groups
    const float* scale;      // [rows][groups]
    const int64_t* columns;  // [cols] natural place of each column
    void* dense;             // [rows][cols] of `type`, float32 or bfloat16
    Type type;
    float* to_latent;  // [rows][cols]
    float* to_scale;   // [rows][groups]
};

// The search for a group's row scales (src/ptq161/mixed.py has the reasons). Every candidate decides the levels of its
// row; the scale is then the best one for these, and the candidate whose scale leaves the smallest weighted squared error
// wins. `group` is not of signs, whose best scale has a closed form.
struct ScaleSearch {
    int64_t rows, candidates;
    LatentGroup group;
    const float* part;        // [rows][group.cols]
    const float* importance;  // [group.cols]
    const float* candidate;   // [rows][candidates]; the first is kept where no error is finite
    float smallest;           // scale there is
    float* scale;             // [rows]
};

struct Kernel {
    const char* name;
    bool (*supported)();  // by the processor that runs this
    // Gathers (and rounds) the blocks [first_block, last_block) of one token into `out`, where it is token `slot`.
    // False if `order` names a channel that does not exist.
    bool (*gather)(const Product&, int64_t token, int64_t first_block, int64_t last_block, Activations& out,
                   int64_t slot);
    // Writes y for the tiles [first_tile, last_tile) and all tokens of `in`, which start at `first_token` of x and y.
    void (*multiply)(const Product&, const Activations& in, int64_t first_token, int64_t first_tile, int64_t last_tile);
    // Writes y for the rows [first_row, last_row). Made for few tokens: every four of them read the weight once.
    void (*dense)(const DenseProduct&, int64_t first_row, int64_t last_row);
    // The rows [first_row, last_row) of latents forward and backward.
    void (*round)(const Latents&, int64_t first_row, int64_t last_row);
    void (*round_backward)(const Latents&, int64_t first_row, int64_t last_row);
    // Writes the scales of the rows [first_row, last_row).
    void (*search)(const ScaleSearch&, int64_t first_row, int64_t last_row);
};

// The kernels that run here, fastest first; the last is always the scalar one.
const std::vector<const Kernel*>& available_kernels();

// Computes the product with up to `threads` threads. Throws std::invalid_argument if `order` is not sound.
void linear(const Kernel& kernel, const Product& product, int threads);
void dense(const Kernel& kernel, const DenseProduct& product, int threads);
// Throws std::invalid_argument if groups and columns are not sound.
void round_latents(const Kernel& kernel, const Latents& latents, bool backward, int threads);
// Throws std::invalid_argument if there is nothing to search, or the levels are not known here.
void search_scales(const Kernel& kernel, const ScaleSearch& search, int threads);

// Stored bytes of a row of codes of a group, at `levels` levels (docs/format.md). Throws std::invalid_argument.
int64_t stored_row_bytes(const Layout& layout, int64_t group, int levels);

// Codes of one group from the stored order, [rows][stored_row_bytes], into the linear's tiles, and back without loss.
void codes_to_tiles(const Layout& layout, int64_t group, int levels, const uint8_t* stored, uint8_t* tiles,
                    int threads);
void codes_from_tiles(const Layout& layout, int64_t group, int levels, const uint8_t* tiles, uint8_t* stored,
                      int threads);

// Reads memory once, as a product with nothing to compute would; returns a sum that keeps it from being left out.
uint64_t read_memory(const uint64_t* words, int64_t count, int threads);

}  // namespace ptq161
