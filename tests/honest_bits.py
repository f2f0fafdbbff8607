"""What storing a quantized decoder block takes, worked out from the shapes of its linears alone, method by method."""

from collections.abc import Mapping, Sequence

Shape = tuple[int, int]


def groups(cols: int, size: int | None) -> int:
    return 1 if size is None else -(-cols // size)


def uniform(bits: int, group: int | None, shapes: Sequence[Shape]) -> int:
    """Codes, and a float16 scale and a zero point as wide as a code for every row and group."""
    return sum(bits * r * c + r * groups(c, group) * (16 + bits) for r, c in shapes)


def owq(bits: int, target: float, shapes: Sequence[Shape]) -> int:
    """The spare bits in equal parts on all linears, each in whole pairs of float16 columns, with their indices."""
    spare = (target - bits) * sum(r * c for r, c in shapes) / (16 - bits) / len(shapes)
    total = 0
    for r, c in shapes:
        weak = round(spare / r)
        weak = min(weak + weak % 2, c)
        total += bits * r * (c - weak) + 16 * r * weak + 16 * weak + r * (16 + bits)
    return total


def pb_llm(shapes: Sequence[Shape]) -> int:
    """A tenth of the weights at 8 bits (the threshold itself counts as low), a bitmap, 56 bits a row."""
    total = 0
    for r, c in shapes:
        low = int(r * c * 0.9) + 1
        total += low + 8 * (r * c - low) + r * c + r * 56
    return total


def block_bits(method: str, inputs: Mapping[int, Sequence[Shape]]) -> int:
    """Bits of one block. inputs: shared input, by any number -> (rows, cols) of the linears that see it."""
    shapes = [shape for shared in inputs.values() for shape in shared]
    name, _, setting = method.partition(":")[0].partition("-w")
    if name in ("rtn", "gptq", "awq", "omniquant"):
        bits, _, group = setting.partition("g")
        scales = sum(16 * shared[0][1] for shared in inputs.values()) if name == "awq" else 0
        order = sum(16 * c for _, c in shapes) if group and method.endswith(":act_order=true") else 0
        return uniform(int(bits), int(group) if group else None, shapes) + scales + order
    if name == "autoround":
        return uniform(2, 128, shapes)
    if name == "owq":
        return owq(int(setting), int(setting) + 0.01, shapes)
    return {
        "billm": lambda: sum(2 * r * c + c + r * groups(c, 128) * 7 * 16 for r, c in shapes),
        "pb-llm": lambda: pb_llm(shapes),
        "quip": lambda: sum(2 * r * c + 16 * c + 32 + 64 for r, c in shapes),
        "smoothquant": lambda: sum(4 * r * c + 16 * r for r, c in shapes),
    }[name]()


LLAMACPP_BITS = {"IQ1_S": 1.5625, "IQ2_XXS": 2.0625, "Q2_K": 2.625}


def llamacpp_bits(kind: str, widths: Mapping[str, int], blocks: int) -> float:
    """Bits of all linears of an IQ1_S or IQ2_XXS file with these widths, which are multiples of 256."""
    hidden, inner = widths["hidden"], widths["inner"]
    queries, keys = widths["heads"] * widths["head"], widths["kv_heads"] * widths["head"]
    assert not any(width % 256 for width in (hidden, inner, queries)) and widths["heads"] < 4 * widths["kv_heads"]
    base, second = LLAMACPP_BITS[kind], LLAMACPP_BITS["Q2_K"]
    block = base * (hidden * queries + hidden * keys + 2 * hidden * inner)  # query, key, gate, up
    block += second * hidden * keys + LLAMACPP_BITS["IQ2_XXS"] * hidden * queries  # value, output
    early = blocks // 8
    return blocks * block + hidden * inner * (early * second + (blocks - early) * base)


CODES_PER_BYTE = {"1bit": 8, "ternary": 5, "4bit": 2}


def packed_bits(layers: Sequence[Mapping[str, object]], paper: bool) -> int:
    """Codes and row vectors of a packed model; which channel has which width is not in it.

    layers: `rows`, `cols`, `linears` of a kind and how many `columns` have which width. A scale for every row and
    group; of the paper's format also a mean and a column factor for the binarized, a zero point for the 4-bit ones.
    """
    total = 0
    for layer in layers:
        rows, each = layer["rows"], 0
        for width, cols in layer["columns"].items():
            each += 8 * rows * -(-cols // CODES_PER_BYTE[width]) + 16 * rows
            if paper and width == "1bit":
                each += 16 * rows + 16 * cols
            if paper and width == "4bit":
                each += 8 * -(-rows // 2)
        total += layer["linears"] * each
    return total
