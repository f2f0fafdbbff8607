"""The quantized model while the whole of it is tuned: the original's modules called with other weights.

Where memory is short, blocks keep nothing but their inputs and are computed again in the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ptq161.arithmetic import products_in
from ptq161.config import QuantConfig
from ptq161.fit import weight_arguments
from ptq161.latent import LatentWeight


@dataclass(frozen=True)
class Student:
    """What is tuned: latent weights by linear, and norm weights by parameter name, float32 leaves.

    dtype: of the matrix products, and so of the rounded weights (`arithmetic`). recomputed: module names of the blocks
    whose inner states and weights are not kept for the backward pass.
    """

    latents: dict[str, LatentWeight]
    norms: dict[str, Tensor]
    dtype: torch.dtype
    recomputed: tuple[str, ...] = ()

    def weights(self, names: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Parameter name -> tensor for `torch.func.functional_call`: exactly what a file would hold.

        names: which parameters are wanted.
        """
        dense = {name: weight.dense(self.dtype) for name, weight in self.latents.items() if names(f"{name}.weight")}
        return weight_arguments(dense) | {name: norm for name, norm in self.norms.items() if names(name)}

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that is learned, by a name of its own."""
        latents = {f"{name}.latent": weight.latent for name, weight in self.latents.items()}
        gains = {f"{name}.gain": weight.gain for name, weight in self.latents.items()}
        return latents | gains | self.norms

    def logits(self, model: PreTrainedModel, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """What the quantized model predicts: `model` with these weights, which it does not keep."""
        inside = tuple(f"{name}." for name in self.recomputed)
        with ExitStack() as stack:
            for name in self.recomputed:
                stack.enter_context(_recomputed(model, name, partial(self._block_weights, f"{name}.")))
            weights = self.weights(lambda name: not name.startswith(inside))
            stack.enter_context(products_in(self.dtype, tokens.device))
            outputs = torch.func.functional_call(model, weights, (tokens,), {"use_cache": False})
        result: Tensor = outputs.logits
        return result

    def _block_weights(self, prefix: str) -> dict[str, Tensor]:
        weights = self.weights(lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


class _Recomputed(nn.Module):
    """Stands in for a block: runs it with other weights, made when they are needed, and again in the backward pass."""

    def __init__(self, block: nn.Module, weights: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.block, self.weights = block, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.block, self.weights(), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Some models read settings off their blocks, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


@contextmanager
def _recomputed(model: nn.Module, name: str, weights: Callable[[], dict[str, Tensor]]) -> Iterator[None]:
    block = model.get_submodule(name)
    model.set_submodule(name, _Recomputed(block, weights))
    try:
        yield
    finally:
        model.set_submodule(name, block)


def student_of(
    model: PreTrainedModel, latents: Mapping[str, LatentWeight], dtype: torch.dtype, recomputed: tuple[str, ...] = ()
) -> Student:
    """Latents of some linears, and copies of all norm weights: the vectors that belong to no linear."""
    linears = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    norms = {
        name: parameter.detach().float().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith(".weight") and name.removesuffix("weight") not in linears
    }
    return Student(dict(latents), norms, dtype, recomputed)


def memory_bytes(
    model: PreTrainedModel,
    weights: int,
    seqlen: int,
    config: QuantConfig,
    dtype: torch.dtype,
    *,
    recomputed: bool = False,
) -> int:
    """Estimated memory on top of the model: `weights` latents learned on samples of `seqlen` tokens.

    Per weight: latent, gradient and two moments in float32, the rounded weight and its gradient in `dtype`, that of
    the matrix products. Per token: about 24 hidden states per block in `dtype` kept for the backward pass, and three
    rows of logits. With blocks `recomputed`, rounded weights and states are those of one block, and of every other
    block one float32 state.
    """
    text = model.config.get_text_config()
    vocabulary, layers = text.vocab_size, text.num_hidden_layers
    at_once = 1 if recomputed else layers
    tokens = config.distill_batch_size * seqlen
    states = text.hidden_size * (dtype.itemsize * 24 * at_once + 4 * (layers - at_once))
    result: int = (
        weights * 4 * 4 + weights * 2 * dtype.itemsize * at_once // layers + tokens * (states + 3 * 4 * vocabulary)
    )
    return result
