"""What every method takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ptq161.binarize import QuantizedWeight
from ptq161.blocks import BlockTask
from ptq161.config import QuantConfig
from ptq161.fit import OnStep
from ptq161.latent import LatentWeight


@dataclass(frozen=True)
class BlockResult:
    """What a method made of a block: weights exactly as they will be stored, and the objective before and after.

    outputs: the quantized stream out of the block with these weights, (samples, seq, hidden).
    latents: what the codes were rounded from, where they were learned and can be learned further.
    """

    weights: dict[str, QuantizedWeight]
    loss_first: float
    loss_last: float
    outputs: Float[Tensor, "samples seq hidden"]
    latents: dict[str, LatentWeight] | None = None


Method = Callable[[BlockTask, QuantConfig, OnStep], BlockResult]
