"""Packed tiny models without the pipeline: linears quantized with their initial factors, saved and read back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from families import FAMILIES, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.binarize import CODE_WIDTHS, ColumnGroup, QuantizedWeight, quantize_weight, reconstruct, salient_columns
from ptq161.config import SalientRange
from ptq161.hf import save_packed
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.packing import PackedWeight, pack, unpack
from ptq161.vocabulary import pack_vocabulary, vocabulary_specs

OWNERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # linears that see the same input


def random_weight(rows: int, cols: int, salient: int, row_mean: bool = True, seed: int = 0) -> QuantizedWeight:
    """A random weight with `salient` 4-bit columns in random places."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mask = salient_columns(torch.rand(cols, generator=generator), salient)
    return quantize_weight(weight, mask, salient_range=SalientRange.ROW, row_mean=row_mean)


def random_groups(
    rows: int, sizes: Mapping[str, int] | Sequence[tuple[str, int]], paper: bool = False, seed: int = 0
) -> QuantizedWeight:
    """Random codes in column groups of these widths and sizes, columns in random places.

    paper: signs have a mean and a column scale, 4-bit groups a zero, as in the paper's format. Ternary groups never do.
    """
    pairs = list(sizes.items() if isinstance(sizes, Mapping) else sizes)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(sum(count for _, count in pairs), generator=generator)
    groups, start = [], 0
    for name, count in pairs:
        width = CODE_WIDTHS[name]
        digits = torch.randint(width.count, (rows, count), generator=generator)
        factors = {}
        if paper and name == "1bit":
            factors["mean"] = 0.01 * torch.randn(rows, 1, generator=generator)
            factors["col"] = 0.5 + torch.rand(1, count, generator=generator)
        if paper and name == "4bit":
            factors["zero"] = width.lowest + width.step * torch.randint(16, (rows, 1), generator=generator).float()
        groups.append(
            ColumnGroup(
                columns=places[start : start + count].sort().values,
                width=width,
                codes=(digits * width.step + width.lowest).to(torch.int8),
                scale=0.01 + 0.02 * torch.rand(rows, 1, generator=generator),
                **factors,
            )
        )
        start += count
    return QuantizedWeight(tuple(groups))


def quantize_linears(
    model: PreTrainedModel, keep: Callable[[str], bool] = lambda name: True
) -> tuple[ModelLayout, dict[str, Tensor]]:
    """Pack the linears of a model's blocks that `keep` says, a fifth of their columns at 4 bits; the model is left."""
    specs: dict[str, PackedLinearSpec] = {}
    packed: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or "." not in name or not keep(name):  # the head has no dot
            continue
        importance = torch.rand(linear.in_features, generator=torch.Generator().manual_seed(linear.in_features))
        mask = salient_columns(importance, linear.in_features // 5)
        weight = pack(quantize_weight(linear.weight.detach(), mask, salient_range=SalientRange.ROW, row_mean=True))
        parent, _, leaf = name.rpartition(".")
        owner = f"{parent}.{OWNERS[leaf]}" if leaf in OWNERS else None
        specs[name] = PackedLinearSpec(weight.layout, owner)
        packed |= {f"{name}.{tensor}": weight.tensors[tensor] for tensor in specs[name].specs()}
    return ModelLayout(specs), packed


def packed_weight(layout: ModelLayout, packed: Mapping[str, Tensor], name: str) -> PackedWeight:
    """One linear of a packed model, column types fetched from their owner."""
    spec = layout.modules[name]
    owner = spec.columns_from or name
    tensors = {t: packed[f"{owner if t == 'column_types' else name}.{t}"] for t in spec.layout.specs()}
    return PackedWeight(spec.layout, tensors)


@torch.no_grad()
def install(model: PreTrainedModel, layout: ModelLayout, packed: Mapping[str, Tensor]) -> PreTrainedModel:
    """Put the dense reconstruction into the model: what a loaded packed model must compute."""
    for name in layout.modules:
        model.get_submodule(name).weight.copy_(reconstruct(unpack(packed_weight(layout, packed, name))))
    return model


def mixed_linears(
    model: PreTrainedModel, keep: Callable[[str], bool] = lambda name: True
) -> tuple[ModelLayout, dict[str, Tensor]]:
    """As `quantize_linears`, in the mixed format: random 1-bit, ternary and 4-bit codes, the model's weights unread."""
    specs: dict[str, PackedLinearSpec] = {}
    packed: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or ".layers." not in name or not keep(name):
            continue
        cols = linear.in_features
        sizes = {"1bit": cols // 4, "ternary": cols - cols // 4 - cols // 8, "4bit": cols // 8}
        weight = pack(random_groups(linear.out_features, sizes, seed=cols))
        parent, _, leaf = name.rpartition(".")
        owner = f"{parent}.{OWNERS[leaf]}" if leaf in OWNERS else None
        specs[name] = PackedLinearSpec(weight.layout, owner)
        packed |= {f"{name}.{tensor}": weight.tensors[tensor] for tensor in specs[name].specs()}
    return ModelLayout(specs), packed


def write_packed(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype | None = None,
    tokenizer=None,
    mixed=False,
    layers: int | None = None,
    int8_head=False,
    **options,
):
    """Save a packed tiny model and return the dense reconstruction it must equal, in float32."""
    config = FAMILIES[family]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    model = build(config)
    layout, packed = mixed_linears(model) if mixed else quantize_linears(model)
    if int8_head:
        layout = replace(layout, vocabulary=vocabulary_specs(model))
        packed |= pack_vocabulary(model.state_dict(), layout.vocabulary)
    run = {"model": "tiny", "config": {"bits": 1.61}, "timing": {"seconds": 1.0}}
    save_packed(folder, model, layout, packed, dtype=dtype, run=run, tokenizer=tokenizer, **options)
    return install(model, layout, packed)
