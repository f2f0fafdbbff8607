"""The GPU programs, in Triton. gpu.py starts them; the order of a weight in memory is that of kernels/tiles.py.

`multiply`: a program owns R rows (16 or 32, all of one tile) and up to 8 tokens, and its warps share out the columns:
S, a dimension of the blocks below, counts them. Each takes KW units at a time, 32 bits of codes of every row; a unit is
128 bytes that lie side by side. Two columns lie 16 bits apart in a word: shifted and masked they become the top
mantissa bits of two 16-bit floats between 1 and 2,

    v = 1 + digit / 2**bits          two weights in a shift, an AND and an OR; no conversion of integers

and tensor cores add up v * u, u being the activations in the order of the groups times the column scale. A level is
lowest + step * digit = a * v + b, so with U the sum of the same, rounded u

    y = sum over groups of  scale * (a * sum(v * u) + (b - zero) * U) + mean * U

in float32. The difference costs two or three bits of 24. float32 activations are three bfloat16 parts, each multiplied.

`dequantize`: a program writes 32 rows of some columns of one group to where the columns belong.

GROUPS and GROUP are compiled in: (bits, lowest, step, has zero, has mean) of a group. Sizes of groups are not: they
differ from linear to linear. `no_type_check` keeps the type checks of the tests out: these functions are read as text.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _weights(words, PLACE: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Words of codes (S, R, KW) -> v of the digits at bits PLACE and PLACE + 16, (S, R, 2 * KW)."""
    TOP: tl.constexpr = (7 if tl.bfloat16 == DOT else 10) - BITS  # where a digit belongs in the mantissa
    MASK: tl.constexpr = ((1 << BITS) - 1) << TOP
    ONE: tl.constexpr = 0x3F80 if tl.bfloat16 == DOT else 0x3C00
    # Bits that a shift brings into the other half or the sign are masked away.
    moved = words >> (PLACE - TOP) if PLACE >= TOP else words << (TOP - PLACE)
    pair = (moved & (MASK | MASK << 16)) | (ONE | ONE << 16)
    low = pair.to(tl.int16).to(DOT, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(DOT, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
@no_type_check
def _multiply_add(weights, u, sums, DOT: tl.constexpr, INTERPRETED: tl.constexpr):
    """sums + weights @ u: (S, R, 8) + (S, R, K) @ (T, S, K), whose T tokens are repeated to be 8."""
    T: tl.constexpr = u.shape[0]
    S: tl.constexpr = u.shape[1]
    K: tl.constexpr = u.shape[2]
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    OPERAND: tl.constexpr = tl.float32 if INTERPRETED else DOT
    weights = weights.to(OPERAND)
    u = tl.broadcast_to(u[None], [8 // T, T, S, K]).reshape(8, S, K).permute(1, 2, 0)
    high = u.to(DOT)
    sums = tl.dot(weights, high.to(OPERAND), sums)
    if u.dtype == tl.float32:
        rest = u - high.to(tl.float32)
        middle = rest.to(DOT)
        sums = tl.dot(weights, middle.to(OPERAND), sums)
        low = (rest - middle.to(tl.float32)).to(DOT)
        sums = tl.dot(weights, low.to(OPERAND), sums)
    return sums


@triton.jit
@no_type_check
def _activations(x_ptr, col_ptr, channel, column, token, tokens, cols, SPLIT: tl.constexpr, DOT: tl.constexpr):
    """u of these channels, (T, S, K): rounded to DOT, or with SPLIT as float32. Channel -1 gives zeros."""
    inside = (channel >= 0)[None] & (token < tokens)[:, None, None]
    u = tl.load(x_ptr + token[:, None, None] * cols + channel[None], mask=inside, other=0)
    if col_ptr is not None:
        u = u.to(tl.float32) * tl.load(col_ptr + column, mask=channel >= 0, other=0).to(tl.float32)[None]
    return u.to(tl.float32) if SPLIT else u.to(DOT)


@triton.jit
@no_type_check
def _group_sums(
    x_ptr,
    words_ptr,  # the group's codes in the tile, int32
    order_ptr,
    col_ptr,
    row,
    token,
    tokens,
    cols,
    first,  # columns of the groups before it
    size,  # columns of the group
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    S: tl.constexpr,
    KW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sum(v * u), (R, 8), and U, (1, 8), of one group; the 8 are the tokens, repeated."""
    T: tl.constexpr = token.shape[0]
    PER_UNIT: tl.constexpr = 32 // BITS
    warp = tl.arange(0, S)[:, None]
    half = tl.arange(0, 2 * KW)[None, :]
    units = tl.cdiv(size, PER_UNIT)
    words_ptr += (row % 32)[None, :, None]
    sums = tl.zeros([S, row.shape[0], 8], tl.float32)
    total = tl.zeros([T, S, 2 * KW], tl.float32)
    for start in range(0, units, S * KW):
        unit = start + warp * KW + tl.arange(0, KW)[None, :]
        words = tl.load(words_ptr + unit[:, None, :] * 32, mask=(unit < units)[:, None, :], other=0)
        column = (start + warp * KW + half // 2) * PER_UNIT + half % 2 * 2
        # All activations before the first product: loads that wait for loads, but once and not for every plane.
        channels = ()
        for plane in tl.static_range(16 // BITS):
            c = column + (plane * BITS % 8 // BITS * 4 + plane * BITS // 8)
            channel = c if order_ptr is None else tl.load(order_ptr + first + c, mask=c < size, other=0)
            channels += (tl.where(c < size, channel, -1),)
        planes = ()
        for plane in tl.static_range(16 // BITS):
            c = first + column + (plane * BITS % 8 // BITS * 4 + plane * BITS // 8)
            u = _activations(x_ptr, col_ptr, channels[plane], c, token, tokens, cols, SPLIT, DOT)
            total += u.to(tl.float32)
            planes += (u,)
        for plane in tl.static_range(16 // BITS):
            weights = _weights(words, plane * BITS, BITS, DOT)
            sums = _multiply_add(weights, planes[plane], sums, DOT, INTERPRETED)
    all_u = tl.sum(tl.sum(total, 2), 1)
    return tl.sum(sums, 0), tl.broadcast_to(all_u[None], [8 // T, T]).reshape(8)[None, :]


@triton.jit
@no_type_check
def _row_vector(ptr, row, TYPE: tl.constexpr):
    return tl.load(ptr.to(tl.pointer_type(TYPE)) + row % 32).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "cols", "tokens", "cols_0", "cols_1", "cols_2", "cols_3"])
@no_type_check
def multiply(
    x_ptr,  # (tokens, cols)
    tiles_ptr,  # uint8 (tiles, tile_bytes)
    order_ptr,  # int32 (cols,) or None
    col_ptr,  # float16 (cols,) or None
    bias_ptr,  # (rows,) or None
    y_ptr,  # (tokens, rows)
    rows,
    cols,
    tokens,
    tile_bytes,
    cols_0,
    cols_1,
    cols_2,
    cols_3,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    KW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y = x @ W.T + bias for R rows and T tokens: programs are (rows / R, tokens / T)."""
    sizes = (cols_0, cols_1, cols_2, cols_3)
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.program_id(1) * T + tl.arange(0, T)
    codes_ptr = tiles_ptr + (tl.program_id(0) * R // 32).to(tl.int64) * tile_bytes
    vectors_ptr = codes_ptr
    for g in tl.static_range(len(GROUPS)):
        vectors_ptr += tl.cdiv(sizes[g], 32 // GROUPS[g][0]) * 128
    y = tl.zeros([R, 8], tl.float32)
    first = 0
    for g in tl.static_range(len(GROUPS)):
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))
        sums, all_u = _group_sums(
            x_ptr, words_ptr, order_ptr, col_ptr, row, token, tokens, cols, first, sizes[g],
            GROUPS[g][0], SPLIT, DOT, S, KW, INTERPRETED,
        )  # fmt: skip
        a = GROUPS[g][2] * 2 ** GROUPS[g][0]
        part = a * sums + (GROUPS[g][1] - a) * all_u
        scale = _row_vector(vectors_ptr, row, tl.float16)
        vectors_ptr += 64
        if GROUPS[g][4]:
            y += _row_vector(vectors_ptr, row, tl.float16) * all_u
            vectors_ptr += 64
        if GROUPS[g][3]:
            part -= _row_vector(vectors_ptr, row, tl.int8) * all_u
            vectors_ptr += 32
        y += scale * part
        codes_ptr += tl.cdiv(sizes[g], 32 // GROUPS[g][0]) * 128
        first += sizes[g]

    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    n = tl.arange(0, 8)
    place = tl.program_id(1) * T + n
    inside = (row < rows)[:, None] & ((n < T) & (place < tokens))[None, :]
    tl.store(y_ptr + place[None, :] * rows + row[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "cols", "codes", "vectors", "first", "size"])
@no_type_check
def dequantize(
    tiles_ptr,
    order_ptr,
    col_ptr,
    dense_ptr,  # (rows, cols)
    rows,
    cols,
    tile_bytes,
    codes,  # offset of the group's codes in a tile
    vectors,  # offset of its row vectors
    first,  # columns of the groups before it
    size,  # columns of the group
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dense[:, channels of one group] for the 32 rows of a tile and COLUMNS columns: programs are (tiles, columns)."""
    BITS: tl.constexpr = GROUP[0]
    PER_UNIT: tl.constexpr = 32 // BITS
    lane = tl.arange(0, 32)
    row = tl.program_id(0) * 32 + lane
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * tile_bytes
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    # A word is loaded once for each of its columns: lanes are columns, so that what is stored lies close together.
    words_ptr = (tile_ptr + codes).to(tl.pointer_type(tl.int32))
    words = tl.load(words_ptr + (column // PER_UNIT * 32)[None, :] + lane[:, None], mask=inside[None, :], other=0)
    place = column % 4 * 8 + column % PER_UNIT // 4 * BITS
    digits = (words >> place[None, :]) & ((1 << BITS) - 1)
    values = (digits * GROUP[2] + GROUP[1]).to(tl.float32)
    vectors_ptr = tile_ptr + vectors
    scale = _row_vector(vectors_ptr, row, tl.float16)
    vectors_ptr += 64
    mean_ptr = vectors_ptr
    if GROUP[4]:
        vectors_ptr += 64
    if GROUP[3]:
        values -= _row_vector(vectors_ptr, row, tl.int8)
    values *= scale
    if GROUP[4]:
        values += _row_vector(mean_ptr, row, tl.float16)
    if col_ptr is not None:
        values *= tl.load(col_ptr + first + column, mask=inside, other=0).to(tl.float32)[None, :]
    channel = column if order_ptr is None else tl.load(order_ptr + first + column, mask=inside, other=0)
    place_ptr = dense_ptr + row.to(tl.int64)[:, None] * cols + channel[None, :]
    tl.store(place_ptr, values.to(dense_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])
