// Stored codes into tiles and back: what loading a model costs, so each byte is looked up once.
//
// A row of stored codes is read by a table, byte -> its digits, into a buffer with a byte per column; four columns of a
// unit are then one 32-bit word of that buffer, shifted to their bits. The way back is the same in reverse.

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "kernels.h"

namespace ptq161 {

namespace {

constexpr int kMostDigits = 8;  // in a byte

struct Digits {
    int count;                                                 // in a byte
    std::array<std::array<uint8_t, kMostDigits>, 256> of;      // byte -> digits, the first one first
    std::array<uint8_t, kMostDigits> power;                    // what each digit counts
};

Digits digits_of(int levels) {
    Digits made{};
    for (int capacity = levels; capacity <= 256 && made.count < kMostDigits; capacity *= levels) ++made.count;
    for (int byte = 0; byte < 256; ++byte) {
        for (int i = 0, power = 1; i < made.count; ++i, power *= levels) {
            made.of[size_t(byte)][size_t(i)] = uint8_t(byte / power % levels);
            made.power[size_t(i)] = uint8_t(power);
        }
    }
    return made;
}

// What both directions need of a group, checked.
struct Rows {
    const Layout& layout;
    const Group& group;
    Digits digits;
    int64_t stored_bytes;  // of a row
    size_t columns;        // of the buffer with a byte per column: whole units, whole bytes, and what is written past them

    Rows(const Layout& of, int64_t index, int levels) : layout(of), group(of.groups.at(size_t(index))), digits{} {
        if (levels < 2 || levels > 1 << group.bits) throw std::invalid_argument("levels do not fit into the codes");
        digits = digits_of(levels);
        stored_bytes = (group.cols + digits.count - 1) / digits.count;
        columns = size_t(std::max(group.padded(), stored_bytes * digits.count)) + kMostDigits;
    }
};

void row_to_units(const Rows& rows, const uint8_t* stored, uint8_t* buffer, uint8_t* units) {
    const Group& group = rows.group;
    for (int64_t byte = 0; byte < rows.stored_bytes; ++byte) {
        std::memcpy(buffer + byte * rows.digits.count, rows.digits.of[stored[byte]].data(), kMostDigits);
    }
    std::memset(buffer + group.cols, 0, rows.columns - size_t(group.cols));
    const int64_t columns = group.columns_per_unit();
    for (int64_t unit = 0; unit < group.units; ++unit, buffer += columns, units += kUnitBytes) {
        uint32_t word = 0;
        for (int place = 0; place < 8; place += group.bits) {
            uint32_t four;
            std::memcpy(&four, buffer + 4 * (place / group.bits), sizeof four);
            word |= four << place;
        }
        std::memcpy(units, &word, sizeof word);
    }
}

void units_to_row(const Rows& rows, const uint8_t* units, uint8_t* buffer, uint8_t* stored) {
    const Group& group = rows.group;
    const uint32_t mask = ((1u << group.bits) - 1u) * 0x01010101u;
    const int64_t columns = group.columns_per_unit();
    for (int64_t unit = 0; unit < group.units; ++unit, units += kUnitBytes) {
        uint32_t word;
        std::memcpy(&word, units, sizeof word);
        for (int place = 0; place < 8; place += group.bits) {
            const uint32_t four = (word >> place) & mask;
            std::memcpy(buffer + unit * columns + 4 * (place / group.bits), &four, sizeof four);
        }
    }
    std::memset(buffer + group.cols, 0, rows.columns - size_t(group.cols));
    for (int64_t byte = 0; byte < rows.stored_bytes; ++byte, buffer += rows.digits.count) {
        unsigned sum = 0;
        for (int i = 0; i < rows.digits.count; ++i) sum += unsigned(buffer[i]) * rows.digits.power[size_t(i)];
        stored[byte] = uint8_t(sum);
    }
}

}  // namespace

int64_t stored_row_bytes(const Layout& layout, int64_t group, int levels) {
    return Rows(layout, group, levels).stored_bytes;
}

void codes_to_tiles(const Layout& layout, int64_t group, int levels, const uint8_t* stored, uint8_t* tiles,
                    int threads) {
    const Rows rows(layout, group, levels);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> buffer(rows.columns);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < layout.tiles; ++tile) {
            uint8_t* units = tiles + tile * layout.tile_bytes + rows.group.codes;
            const int64_t first = tile * kTileRows, last = std::min(layout.rows, first + kTileRows);
            for (int64_t row = first; row < last; ++row) {
                row_to_units(rows, stored + row * rows.stored_bytes, buffer.data(), units + 4 * (row - first));
            }
        }
    }
}

void codes_from_tiles(const Layout& layout, int64_t group, int levels, const uint8_t* tiles, uint8_t* stored,
                      int threads) {
    const Rows rows(layout, group, levels);
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> buffer(rows.columns);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < layout.rows; ++row) {
            const uint8_t* tile = tiles + row / kTileRows * layout.tile_bytes;
            const uint8_t* units = tile + rows.group.codes + 4 * (row % kTileRows);
            units_to_row(rows, units, buffer.data(), stored + row * rows.stored_bytes);
        }
    }
}

}  // namespace ptq161
