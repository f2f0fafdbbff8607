"""Find the decoder blocks of any HF model, and learn from its own forward pass how they are called.

A block is an element of the `nn.ModuleList` whose class the model lists as not to be split; its weights are those of
its `nn.Linear`s. Which linears share an input is seen, not guessed from names: they are handed the very same tensor.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ptq161.blocks import BlockCall, tensors_to
from ptq161.budget import LinearShape
from ptq161.errors import UnsupportedModel, UnsupportedModule
from ptq161.space import MEMORY, Space


class _Seen(Exception):
    """Ends a forward pass once all that was wanted has been seen."""


@dataclass(frozen=True)
class Trace:
    """What one pass of the model showed about its blocks."""

    calls: list[BlockCall]
    columns_from: list[dict[str, str]] = field(repr=False)  # per block: linear -> earlier linear with the same input


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the model's decoder blocks: their name (e.g. `model.layers`) and the list itself.

    Raises UnsupportedModel if there is no such list, or more than one.
    """
    names = set(model._no_split_modules or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in names for m in module)
    ]
    kind = type(model).__name__
    if len(found) != 1:
        lists = ", ".join(name for name, _ in found) or "none"
        raise UnsupportedModel(
            f"{kind} has {len(found)} lists of decoder blocks ({lists}); expected exactly one nn.ModuleList of "
            f"{', '.join(sorted(names)) or 'a class named in _no_split_modules'}. Text decoders only."
        )
    return found[0]


def block_linears(model: PreTrainedModel, index: int, block: nn.Module) -> dict[str, nn.Linear]:
    """The block's linears by name. Raises UnsupportedModule if it keeps weight matrices anywhere else, or has none."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    owned = {id(module.weight) for module in linears.values()}
    others = [name for name, p in block.named_parameters() if p.ndim >= 2 and id(p) not in owned]
    where = f"block {index} of {type(model).__name__}"
    if others:
        parents = {name: block.get_submodule(name.rpartition(".")[0]) for name in others}
        shown = ", ".join(f"{name} ({type(parents[name]).__name__})" for name in others[:3])
        raise UnsupportedModule(
            f"{where} keeps weights outside nn.Linear: {shown}{', ...' if len(others) > 3 else ''}. "
            "ptq161 quantizes nn.Linear (and subclasses that compute x @ W.T) only."
        )
    if not linears:
        raise UnsupportedModule(f"{where} has no nn.Linear: there is nothing to quantize.")
    return linears


@contextmanager
def without_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, the list is empty, so that `model.float()` and the like reach everything except the blocks."""
    held = dict(blocks._modules)
    blocks._modules.clear()
    try:
        yield
    finally:
        blocks._modules.update(held)


@contextmanager
def replaced_blocks(blocks: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, a block called by its model runs `forward(index, hidden, *args, **kwargs)` instead of itself."""
    for index, block in enumerate(blocks):
        vars(block)["forward"] = partial(forward, index)
    try:
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@torch.no_grad()
def trace(model: PreTrainedModel, blocks: nn.ModuleList, samples: Int64[Tensor, "samples seq"]) -> Trace:
    """Run up to two samples through the model around its blocks, and record how these are called.

    The blocks themselves run on meta, in float32: no weight of theirs is looked at. Hidden states pass them unchanged.
    Two different samples must lead to the same calls, or the calibration could not replay them.

    Raises UnsupportedModel if a block's call depends on the tokens in any other way than through its hidden states, or
    if a block cannot run without values.
    """
    calls, columns_from = _trace_one(model, blocks, samples[:1])
    if len(samples) > 1:
        again, _ = _trace_one(model, blocks, samples[1:2])
        for index, (one, other) in enumerate(zip(calls, again, strict=True)):
            if not _same_tensors((one.args, one.kwargs), (other.args, other.kwargs)):
                raise UnsupportedModel(
                    f"block {index} of {type(model).__name__} receives inputs that depend on the tokens besides its "
                    "hidden states; calibration cannot replay such a block."
                )
    return Trace(calls, columns_from)


def _trace_one(
    model: PreTrainedModel, blocks: nn.ModuleList, sample: Int64[Tensor, "1 seq"]
) -> tuple[list[BlockCall], list[dict[str, str]]]:
    calls: list[BlockCall] = []
    columns_from: list[dict[str, str]] = []

    def forward(index: int, *args: Any, **kwargs: Any) -> Any:
        if not args:
            raise UnsupportedModel(f"{type(blocks[index]).__name__} is not given its hidden states as first argument.")
        if index != len(calls):
            raise UnsupportedModel(
                f"{type(model).__name__} calls block {index} after block {len(calls) - 1}; calibration needs every "
                "block to run once, in order."
            )
        hidden, *others = args
        shared, output = _run_on_meta(blocks[index], (hidden.float(), *others), kwargs)
        columns_from.append(shared)
        calls.append(BlockCall(tuple(others), kwargs, len(output) if isinstance(output, tuple) else 0))
        if len(calls) == len(blocks):
            raise _Seen
        return calls[index].returned(hidden)

    try:
        with replaced_blocks(blocks, forward):
            model(sample, use_cache=False)
    except _Seen:
        return calls, columns_from
    raise UnsupportedModel(
        f"{type(model).__name__} called {len(columns_from)} of its {len(blocks)} decoder blocks once; "
        "calibration needs every block to run once, in order."
    )


def _run_on_meta(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, str], Any]:
    """Which linears of a block share an input, and its output without values."""
    meta = torch.device("meta")
    copied = copy.deepcopy(block).to(device=meta, dtype=torch.float32)
    vars(copied).pop("forward", None)
    inputs: dict[str, Tensor] = {}
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(_record_input, inputs, name))
    try:
        output = copied.forward(*tensors_to(args, meta), **tensors_to(kwargs, meta))
    except RuntimeError as error:  # torch's for operations that need values
        raise UnsupportedModel(
            f"{type(block).__name__} cannot run without values ({str(error).partition(chr(10))[0]}); expected a block "
            "that computes the same for every token."
        ) from error
    return _first_with_same_input({name: inputs[name] for name, _ in copied.named_modules() if name in inputs}), output


def _record_input(inputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[name] = args[0]


def _first_with_same_input(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Linear -> first linear that was handed the very same tensor object, for all but the first.

    `inputs` is in order of definition, not of use (OPT runs q first but defines it last), so that
    whoever goes through a block's linears meets the first one first.
    """
    first: dict[int, str] = {}
    return {name: first[id(x)] for name, x in inputs.items() if first.setdefault(id(x), name) != name}


def linear_shapes(model: PreTrainedModel, prefix: str, blocks: nn.ModuleList, traced: Trace) -> dict[str, LinearShape]:
    """Full name -> shape of every linear in the decoder blocks."""
    shapes = {}
    for index, block in enumerate(blocks):
        for name, linear in block_linears(model, index, block).items():
            owner = traced.columns_from[index].get(name)
            shapes[f"{prefix}.{index}.{name}"] = LinearShape(
                linear.out_features, linear.in_features, None if owner is None else f"{prefix}.{index}.{owner}"
            )
    return shapes


def config_shapes(config: PreTrainedConfig) -> dict[str, LinearShape]:
    """`linear_shapes` of a bare configuration, without weights: a 65B model takes a second and no memory.

    The blocks stay on meta. All else lies uninitialized (so, untouched) on the CPU, because the models' own masks and
    positions look at values. Raises UnsupportedModel.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        block_linears(model, index, block)
    with without_blocks(blocks):
        model.to_empty(device="cpu")
    sample = torch.zeros(1, 2, dtype=torch.int64)
    return linear_shapes(model, prefix, blocks, trace(model, blocks, sample))


@torch.no_grad()
def first_hidden(
    model: PreTrainedModel, blocks: nn.ModuleList, samples: Int64[Tensor, "samples seq"], space: Space = MEMORY
) -> Float[Tensor, "samples seq hidden"]:
    """The hidden states that enter the first block, float32, for every sample. No block and no head runs."""
    captured: list[Tensor] = []

    def forward(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured.append(hidden)
        raise _Seen

    stream = torch.empty(0, 0, 0)
    with replaced_blocks(blocks, forward):
        for index, sample in enumerate(samples):
            with suppress(_Seen):
                model(sample[None], use_cache=False)
            hidden = captured.pop()
            if not index:
                stream = space.empty((len(samples), *hidden.shape[1:]))
            stream[index] = hidden[0]
    return stream


def _same_tensors(one: Any, other: Any) -> bool:
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        pairs = zip(one, other, strict=True)
    elif isinstance(one, dict):
        pairs = ((value, other.get(key)) for key, value in one.items())
    else:
        return True
    return all(_same_tensors(a, b) for a, b in pairs)
