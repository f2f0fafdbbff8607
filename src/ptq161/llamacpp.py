"""llama.cpp's low-bit models as a contender: its quantizers and its choice of types, our importance matrix.

The quantizers are called in the shared library of an installed llama.cpp (extra `llamacpp`). What is measured is read
back from the GGUF file that was written.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.blocks import watch_inputs
from ptq161.config import unknown
from ptq161.discovery import block_linears, decoder_blocks
from ptq161.errors import InputError
from ptq161.gguf_export import Coded, Widths, padded, read_linears, write_gguf

# Packages that bring llama.cpp along, and where in them its quantizers are.
LIBRARIES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/*ggml-base.*"}
ROWS_AT_ONCE = 64  # a thread's share of a linear


@dataclass(frozen=True)
class Mix:
    """The types of one kind of file, as `llama_tensor_get_type_impl` of llama.cpp's llama-quant.cpp chooses them.

    base: of every linear that is not named. values: attn_v; Q4_K where four or more heads share it. early_down:
    ffn_down in the first eighth of the blocks. down: in the others. output: attn_output. Embedding and head are not
    quantized here, so that they are the same for every method.
    """

    base: Type
    values: Type
    early_down: Type
    down: Type
    output: Type

    def type_of(self, part: str, block: int, blocks: int, group: int) -> Type:
        """part: last part of a linear's name. group: heads that share keys and values."""
        if part == "v_proj":
            return Type.Q4_K if group >= 4 else self.values
        if part == "down_proj":
            return self.early_down if block < blocks // 8 else self.down
        return self.output if part == "o_proj" else self.base


FILE_TYPES = {
    "IQ1_S": Mix(Type.IQ1_S, Type.Q2_K, Type.Q2_K, Type.IQ1_S, Type.IQ2_XXS),
    "IQ1_M": Mix(Type.IQ1_M, Type.Q2_K, Type.Q2_K, Type.IQ1_M, Type.IQ2_XXS),
    "IQ2_XXS": Mix(Type.IQ2_XXS, Type.Q2_K, Type.Q2_K, Type.IQ2_XXS, Type.IQ2_XXS),
    "IQ2_XS": Mix(Type.IQ2_XS, Type.Q2_K, Type.Q2_K, Type.IQ2_XS, Type.IQ2_XS),
    "IQ2_S": Mix(Type.IQ2_XS, Type.IQ3_S, Type.IQ3_S, Type.IQ2_XS, Type.IQ3_S),
    "IQ2_M": Mix(Type.IQ2_S, Type.IQ3_S, Type.IQ3_S, Type.IQ2_S, Type.IQ3_S),
    "Q2_K": Mix(Type.Q2_K, Type.Q3_K, Type.Q3_K, Type.Q3_K, Type.Q3_K),
}


@dataclass(frozen=True)
class LlamaCppResult:
    """A model with the weights that llama.cpp's file has, and what storing its linears takes there.

    parts: `codes` -> bits of the weights that there are; `padding` -> bits of the zeros around them, if any.
    config: the settings for the record: types, library, widths without and with padding.
    """

    model: PreTrainedModel
    parts: dict[str, int]
    weights: int
    file_bytes: int
    config: dict[str, Any]

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the linears, over the weights they have without padding."""
        return sum(self.parts.values()) / self.weights

    @property
    def claimed_bits(self) -> float:
        """The same without the padding: what a model of widths that are multiples of 256 takes."""
        return self.parts["codes"] / self.weights


def file_type(name: str) -> Mix:
    """The mix of types of this name, such as IQ1_S. Raises InputError."""
    if name not in FILE_TYPES:
        raise InputError(unknown("llama.cpp type", name, FILE_TYPES))
    return FILE_TYPES[name]


@torch.no_grad()
def quantize_with_llamacpp(
    model: PreTrainedModel,
    samples: Int64[Tensor, "samples seq"],
    mix: Mix,
    path: Path,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> LlamaCppResult:
    """Write a GGUF file of the model's weights in these types, and put what it holds into the model.

    samples: what the importance matrix is computed from. on_block: told the blocks done, and how many there are.

    Raises InputError if no library is installed, if the model is none that can be exported or the importance matrix is
    no use, or if the file cannot be written.
    """
    quantizer, library = _library()
    widths = Widths.of(model)
    wide = widths.padded
    prefix, blocks = decoder_blocks(model)
    linears = {
        f"{prefix}.{index}.{name}.weight": linear
        for index, block in enumerate(blocks)
        for name, linear in block_linears(model, index, block).items()
    }
    matrix = importance(model, linears, samples)
    coded: dict[str, Coded] = {}
    parts: Counter[str] = Counter()
    for done, (name, linear) in enumerate(linears.items(), 1):
        kind = mix.type_of(name.split(".")[-2], _block(name, prefix), len(blocks), widths.heads // widths.kv_heads)
        weight = padded(name, linear.weight.float().cpu(), widths, wide)
        spread = torch.nn.functional.pad(matrix[name], (0, weight.shape[1] - linear.in_features))
        coded[name] = Coded(_quantized(quantizer, kind, weight.contiguous().numpy(), spread.numpy()), kind)
        stored = 8 * coded[name].rows.nbytes
        parts["codes"] += stored * linear.weight.numel() // weight.numel()
        parts["padding"] += stored - stored * linear.weight.numel() // weight.numel()
        on_block(done * len(blocks) // len(linears), len(blocks))
    write_gguf(model, path, widths, wide, coded)
    for name, values in read_linears(path, model, widths, wide).items():
        linears[name].weight.data.copy_(values)
    return LlamaCppResult(
        model,
        {part: bits for part, bits in parts.items() if bits},
        sum(linear.weight.numel() for linear in linears.values()),
        path.stat().st_size,
        {
            "types": dict(Counter(weight.type.name for weight in coded.values())),
            "library": library,
            "widths": asdict(widths),
            "padded_widths": asdict(wide),
        },
    )


def importance(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], samples: Int64[Tensor, "samples seq"]
) -> dict[str, Float[Tensor, " cols"]]:
    """The importance matrix: linear -> mean square of each input channel over all tokens, as llama-imatrix has it.

    Raises InputError if one is not finite, or all zeros: llama.cpp would quantize it blindly.
    """
    model.eval()
    with watch_inputs(linears) as stats:
        for sample in samples:
            model(input_ids=sample[None].to(model.device), use_cache=False)
    means = {name: (found.square_sum / max(found.tokens, 1)).cpu() for name, found in stats.items()}
    for name, mean in means.items():
        if not mean.isfinite().all() or not mean.any():
            raise InputError(f"the importance matrix of {name} is zero or not finite: other calibration text may help")
    return means


def _block(name: str, prefix: str) -> int:
    return int(name.removeprefix(f"{prefix}.").split(".")[0])


Quantizer = Callable[..., int]  # ggml_quantize_chunk


def _library() -> tuple[Quantizer, str]:
    """The quantizing function of an installed llama.cpp, and whose it is. Raises InputError."""
    for package, pattern in LIBRARIES.items():
        spec = find_spec(package)
        places = [] if spec is None else spec.submodule_search_locations or []
        for file in (file for place in places for file in sorted(Path(place).glob(pattern))):
            try:
                quantizer: Quantizer = ctypes.CDLL(str(file)).ggml_quantize_chunk
            except (OSError, AttributeError) as error:
                raise InputError(f"{file} is no llama.cpp that can be used here: {error}") from error
            pointer, count = ctypes.c_void_p, ctypes.c_int64
            quantizer.restype = ctypes.c_size_t  # type: ignore[attr-defined]
            quantizer.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]  # type: ignore[attr-defined]
            distribution = packages_distributions()[package][0]
            return quantizer, f"{distribution} {version(distribution)}"
    raise InputError('llama.cpp is not installed: pip install "ptq161[llamacpp]"')


def _quantized(
    quantizer: Quantizer,
    kind: Type,
    weight: Float[np.ndarray, "rows cols"],
    weights_of_columns: Float[np.ndarray, " cols"],
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Rows of bytes. The library lets go of the interpreter's lock, and every thread has rows of its own."""
    rows, cols = weight.shape
    size, width = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((rows, cols // size * width), dtype=np.uint8)

    def quantize(first: int) -> int:
        count = min(ROWS_AT_ONCE, rows - first)
        sources, targets, columns = weight[first:], out[first:], weights_of_columns
        return quantizer(int(kind), sources.ctypes.data, targets.ctypes.data, 0, count, cols, columns.ctypes.data)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        written = sum(pool.map(quantize, range(0, rows, ROWS_AT_ONCE)))
    assert written == prod(out.shape), f"{kind.name}: {written} bytes written of {out.shape}"
    return out
