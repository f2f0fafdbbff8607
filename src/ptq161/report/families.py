"""The methods for readers of no paper: what each does, in a sentence, and where its bits go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A method whatever its setting. ours: made by this package's own pipeline, into a file that can be loaded."""

    name: str
    what: str
    ours: bool = False


FAMILIES: dict[str, Family] = {
    "paper": Family(
        "PTQ1.61",
        "the paper's method: a sixth to a fifth of the channels at 4 bits, of the others the signs; scales are learned",
        ours=True,
    ),
    "fast": Family(
        "mixed widths",
        "this package's recipe: channels at 1 bit, a ternary digit or 4 bits, by their worth; codes are learned",
        ours=True,
    ),
    "best": Family(
        "mixed widths, distilled",
        "mixed widths, then the whole model is tuned to the original's predictions",
        ours=True,
    ),
    "rtn": Family("RTN", "every weight to the nearest of a few values; no calibration"),
    "gptq": Family("GPTQ", "rounds channel after channel; those still to come make up for the error"),
    "awq": Family("AWQ", "channels with large inputs are scaled up before rounding, so that they lose less"),
    "omniquant": Family("OmniQuant", "where to cut off large weights is learned, block by block"),
    "quip": Family("QuIP", "weights are rotated at random, so that none stands out, and rounded with feedback"),
    "owq": Family("OWQ", "GPTQ, with the few most sensitive channels left at 16 bits"),
    "pb-llm": Family("PB-LLM", "a tenth of the weights at 8 bits, wherever they lie, of the others the sign"),
    "billm": Family("BiLLM", "signs only, in groups by size; salient columns are binarized twice"),
    "smoothquant": Family(
        "SmoothQuant", "4-bit weights and 4-bit activations; outliers are moved from activations to weights"
    ),
    "llamacpp": Family("llama.cpp", "its own low-bit formats, with an importance matrix"),
    "autoround": Family("AutoRound", "which way each weight is rounded is learned, and where to cut off large ones"),
    "full-precision": Family("full precision", "a model that is not quantized"),
}
PRESET_OF_METHOD = {"ptq161": "paper", "mixed": "fast"}  # rows of `ptq161 eval` name the method, not the preset


def family_of(row: Mapping[str, Any]) -> Family:
    """The family of a row's method; one of its own for a method that nobody described here."""
    method = str(row["method"] or "full-precision").partition(":")[0]
    method = PRESET_OF_METHOD.get(method, method)
    known = FAMILIES.get(method) or FAMILIES.get(method.rpartition("-")[0])
    return known or Family(method, "not described here")


# Part of a quantized linear -> (label, colour purpose).
BIT_PARTS = {
    "codes": ("codes", "sign"),
    "codes_1bit": ("codes", "sign"),
    "codes_ternary": ("codes", "sign"),
    "codes_4bit": ("codes", "sign"),
    "float_columns": ("16-bit channels", "salient"),
    "bitmap": ("which weight is of which kind", "columns"),
    "columns": ("which channel is of which kind", "third"),
    "scales": ("scales, zero points, centres", "scales"),
    "zeros": ("scales, zero points, centres", "scales"),
    "means": ("scales, zero points, centres", "scales"),
    "input_scales": ("scales, zero points, centres", "scales"),
    "seed": ("scales, zero points, centres", "scales"),
    "padding": ("padding", "other"),
}


def bits_by_label(row: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Label -> (colour purpose, bits per weight) of what a row stores."""
    shares: dict[str, tuple[str, float]] = {}
    for part, bits in row["bits_by_part"].items():
        label, purpose = BIT_PARTS.get(part, (part, "other"))
        shares[label] = (purpose, shares.get(label, ("", 0.0))[1] + bits / row["quantized_weights"])
    return shares
