"""AutoRound (Cheng et al., arXiv 2309.05516; https://github.com/intel/auto-round) as a contender: Intel's own package.

Rounding and clipping are learned block by block by signed gradients. The package does the work, with its defaults
(batches of 8 samples, 200 steps for a block, bfloat16) and asymmetric grids; what is here hands it the model and the
tokens that every other row has, and counts the bits.
"""

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.discovery import block_linears, decoder_blocks
from ptq161.errors import InputError
from ptq161.methods.uniform import uniform_bits

BATCH_SIZE = 8


@dataclass(frozen=True)
class AutoRoundSettings:
    """group: input channels that share a scale and a zero point. iters: steps for a block."""

    bits: int = 2
    group: int = 128
    iters: int = 200


@dataclass(frozen=True)
class AutoRoundResult:
    """A model with dequantized weights, in AutoRound's dtype. parts: part -> bits over all of its `weights` weights."""

    model: PreTrainedModel
    parts: dict[str, int]
    weights: int


def quantize_with_autoround(
    model: PreTrainedModel,
    samples: Int64[Tensor, "samples seq"],
    settings: AutoRoundSettings,
    *,
    seed: int,
    device: torch.device,
) -> AutoRoundResult:
    """Quantize the linears of the decoder blocks, in place.

    Raises InputError where AutoRound is not installed, or leaves out a linear (it does not take widths that 32 does not
    divide).
    """
    if find_spec("auto_round") is None:
        raise InputError('AutoRound is not installed: pip install "ptq161[autoround]"')
    import auto_round
    from auto_round.logger import logger

    logger.setLevel("ERROR")
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            rounded, _ = auto_round.AutoRound(
                model,
                tokenizer=object(),  # asked for, but never called: the text is tokens already
                bits=settings.bits,
                group_size=settings.group,
                sym=False,
                iters=settings.iters,
                dataset=[sample[None] for sample in samples],
                nsamples=len(samples),
                seqlen=samples.shape[1],
                batch_size=min(BATCH_SIZE, len(samples)),
                seed=seed,
                device_map=str(device),
                enable_torch_compile=False,
            ).quantize()
    finally:
        torch.use_deterministic_algorithms(deterministic)  # which it turns on for good
    parts: Counter[str] = Counter()
    weights = 0
    prefix, blocks = decoder_blocks(rounded)
    for index, block in enumerate(blocks):
        for name, linear in block_linears(rounded, index, block).items():
            if getattr(linear, "scale", None) is None:
                shape = "x".join(map(str, linear.weight.shape))
                raise InputError(f"AutoRound does not quantize {prefix}.{index}.{name}, which is {shape}")
            parts.update(uniform_bits(linear.weight.shape, settings.bits, settings.group))
            weights += linear.weight.numel()
    return AutoRoundResult(rounded, dict(parts), weights)
