"""Writes the packed checkpoint: safetensors, config, tokenizer, record of the run, model card, checksums.

The same model and settings give the same bytes; only `run.json` may hold times.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import ptq161
from ptq161.contents import header, in_file_order, into_shards, stored_tensors
from ptq161.folder import (
    CARD,
    INDEX,
    METHOD,
    RUN,
    WEIGHTS,
    tensor_bytes,
    tensor_checksum,
    write_checksums,
    write_json,
)
from ptq161.layout import ModelLayout
from ptq161.packing import TensorSpec

SHARD_BYTES = 2 * 10**9


def save_packed(
    folder: str | Path,
    model: PreTrainedModel,
    layout: ModelLayout,
    packed: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    run: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    weights: Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a packed checkpoint into `folder`, which is made if need be.

    weights: everything that is not packed, by its name in the model (None: the model's own), converted to `dtype`
    (None: kept as it is); the weights of the modules in `layout` are not looked at, and with `weights` the model may be
    on meta. packed: full tensor name -> tensor for every name in `layout.tensor_specs()`. Tensors are read and written
    one at a time, into files of at most `shard_bytes`. run: becomes run.json; the model card quotes its `model`,
    `config` and `calibration` if they are there, and its `provenance` goes into config.json.

    Raises ValueError if layout, model and packed tensors do not belong together.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, specs = model.state_dict() if weights is None else weights, layout.tensor_specs()
    strange = (specs.keys() ^ packed.keys()) | ({f"{name}.weight" for name in layout.modules} - state.keys())
    if strange:
        raise ValueError(f"layout, packed tensors and model do not belong together: see {min(strange)}")

    def read(name: str) -> Tensor:
        tensor: Tensor = packed[name] if name in specs else state[name]
        return tensor.detach().to("cpu", stored[name].dtype).contiguous()

    stored = stored_tensors(model, layout, dtype)
    checksums = _write_weights(folder, stored, read, shard_bytes)
    _packed_config(model, layout, dtype or model.dtype, run.get("provenance")).save_pretrained(folder)
    if model.can_generate():
        # Not save_pretrained, which refuses the inconsistent sampling settings that some published models carry.
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / RUN, run)
    (folder / CARD).write_text(model_card(layout, run), encoding="utf-8")
    write_checksums(folder, checksums)


def _write_weights(
    folder: Path, stored: Mapping[str, TensorSpec], read: Callable[[str], Tensor], shard_bytes: int
) -> dict[str, str]:
    """Write the weight files, one tensor in memory at a time, and the index if there are several; return checksums."""
    shards = into_shards(stored, shard_bytes)
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [WEIGHTS]
    checksums: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        specs = {name: stored[name] for name in names}
        with (folder / file).open("wb") as target:
            target.write(header(specs))
            for name in in_file_order(specs):
                tensor = read(name)
                target.write(tensor_bytes(tensor))
                checksums[name] = tensor_checksum(tensor)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(spec.nbytes for spec in stored.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return checksums


def _packed_config(
    model: PreTrainedModel, layout: ModelLayout, dtype: torch.dtype, provenance: Any
) -> PreTrainedConfig:
    """Copy the model's config, with our quantization_config in place of what its source had, and the stored dtype."""
    config = copy.deepcopy(model.config)
    nested = [sub for name in config.sub_configs if (sub := getattr(config, name, None)) is not None]
    for part in (config, *nested):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # a GGUF's or another source's: those weights are not in this folder
        if hasattr(part, "auto_map"):
            del part.auto_map  # it names code files, which are not in this folder either
        part.dtype = dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": METHOD,
        **layout.to_dict(),
        "bits_per_weight": layout.bits_per_weight,
        "ptq161_version": ptq161.__version__,
        "provenance": provenance,
        "checksums": True,
    }
    return config


def model_card(layout: ModelLayout, run: Mapping[str, Any]) -> str:
    """README.md of a packed checkpoint: what it is, its honest bits, how to load it, its settings."""
    settings = {**run.get("config", {}), **run.get("calibration", {})}
    rows = "".join(f"| `{name}` | `{value}` |\n" for name, value in settings.items())
    return CARD_TEXT.format(
        source=f" of `{run['model']}`" if "model" in run else "",
        linears=len(layout.linears),
        weights=f"{layout.quantized_weights:,}",
        bits=f"{layout.bits_per_weight:.4f}",
        paper="" if layout.paper_bits is None else f" The paper's own formula gives {layout.paper_bits:.4f}.",
        others=VOCABULARY_TEXT.format(bits=layout.vocabulary_bits) if layout.vocabulary else OTHERS_TEXT,
        version=ptq161.__version__,
        settings=f"\n## Settings\n\n| setting | value |\n| --- | --- |\n{rows}" if rows else "",
    )


OTHERS_TEXT = "All other tensors are stored as they are."
VOCABULARY_TEXT = """\
Embedding and head, which do not count there, are int8 with one scale per row, {bits:.2f} bits per weight; all other
tensors are stored as they are."""
CARD_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- ptq161
---

# Packed model

The {linears} packed linears{source} ({weights} weights) take **{bits} bits per weight** in this folder's files: codes,
column types, every row and column vector and all padding counted.{paper} {others}
Written by ptq161 {version} after PTQ1.61 (arXiv 2502.13179).

## Load

```python
import ptq161
from transformers import AutoTokenizer

folder = "."  # where this file is
model = ptq161.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

or, with transformers alone once the format is registered:

```python
import ptq161.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
```

transformers without ptq161 stops at the size of the packed weights. `ptq161 verify .` checks every file and tensor.
{settings}"""
