"""Honest bits and bytes: measured on the files of a packed checkpoint, or predicted from a model's configuration.

Both count the same named tensors (`contents`), so a prediction equals what `quantize` will write to the byte.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ptq161.allocation import LAYOUTS
from ptq161.config import Head, QuantConfig, unknown
from ptq161.contents import StoredTensor, header_bytes, into_shards, read_header, stored_tensors
from ptq161.discovery import block_linears, config_shapes, decoder_blocks
from ptq161.errors import CheckpointError, InputError
from ptq161.folder import CONFIG, quantization_config
from ptq161.foreign import complaints
from ptq161.hf import is_packed
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.packing import LinearLayout
from ptq161.saving import SHARD_BYTES
from ptq161.sources import open_config
from ptq161.vocabulary import vocabulary_specs

SALIENT_WIDTH = "4bit"

# The paper's Table 13 in bytes, by the number of quantized weights. The rule it counts by is not published.
TABLE_13 = {6_476_005_376: ("LLaMA-7B", 1.41e9), 12_687_769_600: ("LLaMA-13B", 2.68e9)}


def inspect(
    path: str | Path,
    *,
    method: str = "ptq161",
    bits: float | None = None,
    salient_ratio: float | None = None,
    head: str = Head.KEEP,
) -> dict[str, Any]:
    """Bits per weight and bytes by part of a packed model, or of what a model would become: `ptq161 inspect --json`.

    path: a packed folder, measured from the headers of its files; or a `config.json`, a dense HF folder, a `.gguf` or
    a hub name, predicted from the configuration alone at `bits` (default 1.61) or `salient_ratio`, with the tensors
    that are not quantized in bfloat16. method: whose format to predict, a key of LAYOUTS. head: "int8" for embedding
    and head at 8 bits.

    Raises InputError for a path that is none of these, CheckpointError for a damaged packed folder, UnsupportedModel.
    """
    if is_packed(path):
        if bits is not None or salient_ratio is not None or head != Head.KEEP:
            raise InputError(f"{path} is packed already; bits, salient ratio and head are for a model that is not")
        return _measured(Path(path))
    if bits is None and salient_ratio is None:
        bits = QuantConfig.bits
    if method not in LAYOUTS:
        raise InputError(unknown("method", method, LAYOUTS))
    settings = QuantConfig(bits=bits, salient_ratio=salient_ratio).replaced({"head": head})
    return predict_config(open_config(path), method, settings)


def predict_config(config: PreTrainedConfig, method: str, settings: QuantConfig) -> dict[str, Any]:
    """`inspect` of what a model of this configuration would become, what is not quantized in bfloat16."""
    with complaints(f"transformers cannot build the {config.model_type} model of this configuration"):
        shapes = config_shapes(config)
    model, layout = _empty_model(config), LAYOUTS[method](shapes, settings, None)
    if settings.head is Head.INT8:
        layout = replace(layout, vocabulary=vocabulary_specs(model))
    return predict(model, layout, torch.bfloat16)


def predict(
    model: PreTrainedModel, layout: ModelLayout, dtype: torch.dtype | None, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """`inspect` of the checkpoint that `save_packed` would write for this model, whose weights are not looked at."""
    tensors = stored_tensors(model, layout, dtype)
    shards = into_shards(tensors, shard_bytes)
    headers = sum(header_bytes({name: tensors[name] for name in names}) for names in shards)
    return _report(model, layout, {name: spec.nbytes for name, spec in tensors.items()}, headers, measured=False)


def _measured(folder: Path) -> dict[str, Any]:
    """Sizes of a packed checkpoint. Raises CheckpointError if its files do not hold what its config.json says."""
    try:
        layout = ModelLayout.from_dict(quantization_config(folder))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    stored: dict[str, StoredTensor] = {}
    headers = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors, in_front = read_header(file)
        for name in sorted(stored.keys() & tensors.keys()):
            raise CheckpointError(f"{file}: tensor {name} is in another file of the folder, too; run `ptq161 verify`")
        stored |= tensors
        headers += in_front
    for name, spec in layout.tensor_specs().items():
        found, expected = stored.get(name), StoredTensor.of(spec)
        if found != expected:
            raise CheckpointError(f"{folder}: tensor {name} is {found or 'missing'}, expected {expected}")
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    return _report(_empty_model(open_config(folder)), layout, sizes, headers, measured=True)


def _report(
    model: PreTrainedModel, layout: ModelLayout, sizes: Mapping[str, int], headers: int, *, measured: bool
) -> dict[str, Any]:
    """All the figures, from the bytes of every tensor in the files and of the files' headers."""
    # transformers sorts config.json; in one order, equal layouts give equal sums to the last digit.
    layout = replace(layout, linears=dict(sorted(layout.linears.items())))
    parts = layout.parts()
    stored, weights = sum(parts.values()), layout.quantized_weights
    other = sum(sizes.values()) - stored
    prefix, blocks = decoder_blocks(model)
    linears = [f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in block_linears(model, i, block)]
    name, size = TABLE_13.get(weights, (None, None))
    return {
        "bits_per_weight": 8 * stored / weights,
        "paper_bits": layout.paper_bits,
        "salient_ratio": _salient_weights(layout) / weights,
        "quantized_weights": weights,
        "quantized_linears": len(layout.linears),
        "dense_linears": len(set(linears) - layout.linears.keys()),
        "linears_fp16_bytes": 2 * weights,
        "times_smaller": 2 * weights / stored,
        "parts": parts,
        "other_bytes": other,
        "vocabulary_bits": layout.vocabulary_bits,
        "embedding_bytes": _module_bytes(model, model.get_input_embeddings(), sizes),
        "head_bytes": _module_bytes(model, model.get_output_embeddings(), sizes),
        "header_bytes": headers,
        "file_bytes": stored + other + headers,
        "layers": _layers(layout),
        "measured": measured,
        "paper_table_13": None if name is None else {"model": name, "bytes": size},
    }


def _salient_weights(layout: ModelLayout) -> int:
    groups = [(spec.layout.rows, group) for spec in layout.linears.values() for group in spec.layout.groups]
    return sum(rows * group.cols for rows, group in groups if group.width == SALIENT_WIDTH)


def _module_bytes(model: PreTrainedModel, module: nn.Module | None, sizes: Mapping[str, int]) -> int:
    """Bytes stored under a module's name: 0 for a head that is tied to the embedding, which is stored once."""
    prefix = next((f"{name}." for name, other in model.named_modules() if other is module), None)
    return 0 if prefix is None else sum(size for name, size in sizes.items() if name.startswith(prefix))


def _layers(layout: ModelLayout) -> list[dict[str, Any]]:
    """One entry per distinct linear, by name of its first; sizes are sums over all linears of the kind."""
    kinds: dict[LinearLayout, list[PackedLinearSpec]] = {}
    for spec in layout.linears.values():
        kinds.setdefault(spec.layout, []).append(spec)
    entries = []
    for kind, specs in kinds.items():
        stored = sum(tensor.nbytes for spec in specs for tensor in spec.specs().values())
        columns = {group.width: group.cols for group in kind.groups}
        entries.append(
            {
                "rows": kind.rows,
                "cols": kind.cols,
                "linears": len(specs),
                "columns": columns,
                "bytes": stored,
                "bits_per_weight": 8 * stored / (kind.rows * kind.cols * len(specs)),
                "paper_bits": ModelLayout({"": PackedLinearSpec(kind)}).paper_bits,
            }
        )
    return entries


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    with (
        complaints(f"transformers cannot build the {config.model_type} model of this configuration"),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model
