"""What a run will take: memory, disk, arithmetic. Estimated from sizes alone.

benchmarks/large_model.py holds the memory against what runs are seen to take.
"""

import math
from collections.abc import Sequence

import torch

from ptq161.config import Distill, QuantConfig
from ptq161.methods.mixed import compensates
from ptq161.tuning import needed_bytes, outside_weights
from ptq161.walk import Prepared, asks_for_harms

PROCESS_BYTES = 300_000_000  # torch and transformers loaded

# Float32 original, latent, gradient and two moments are 20; the rounded weights, their gradient and the codes at the
# start 5; the rest is what a backward pass through one linear's rounding needs at once, and what the allocator keeps.
BYTES_PER_WEIGHT = 36


def stream_bytes(prepared: Prepared, shape: Sequence[int]) -> int:
    """One stream of float32 hidden states for calibration tokens of this shape."""
    hidden: int = prepared.model.skeleton.config.get_text_config().hidden_size
    return 4 * math.prod(shape) * hidden


def allotting_bytes(prepared: Prepared, shape: Sequence[int], config: QuantConfig) -> int:
    """Disk for the hidden states that enter every block while the bit budget is divided."""
    if not asks_for_harms(config):
        return 0
    samples = min(config.allocation_samples, shape[0])
    return (len(prepared.model.blocks) - prepared.first + 1) * stream_bytes(prepared, (samples, shape[1]))


def work_bytes(prepared: Prepared, shape: Sequence[int], config: QuantConfig, *, offloaded: bool) -> int:
    """Disk for the work in progress: packed blocks, and two streams, old and new at the moment of renaming.

    With distillation, the latents in float32 too, and old and new state: latents and two moments each. `offloaded`:
    the hidden states of the blocks' inputs go elsewhere.
    """
    latents = 0 if config.distill is Distill.OFF else prepared.layout.quantized_weights * 4 * (1 + 2 * 3)
    saved = 4 * stream_bytes(prepared, shape)
    before = 0 if offloaded else allotting_bytes(prepared, shape, config)
    return max(before, sum(prepared.layout.parts().values()) + saved + latents)


def offload_bytes(prepared: Prepared, shape: Sequence[int], config: QuantConfig) -> int:
    """Disk for streams that are not kept in memory: both, a target or two, and two outputs of the method."""
    return max(allotting_bytes(prepared, shape, config), (5 + compensates(config)) * stream_bytes(prepared, shape))


def memory_bytes(
    prepared: Prepared, shape: Sequence[int], config: QuantConfig, device: torch.device, *, offloaded: bool
) -> int:
    """Estimated peak of anonymous memory, which has to be there; pages of weight files and of offloaded streams come
    and go with what is free.
    """
    model = prepared.model
    held = 2 * model.nbytes if model.resident else 0  # while it is read there are two, and the allocator keeps the room
    stages = [4 * outside_weights(model), _block_bytes(prepared, shape, config, offloaded=offloaded)]
    if asks_for_harms(config):
        stages.append(_allotting_memory(prepared, shape))
    if config.distill is not Distill.OFF:
        stages.append(needed_bytes(model, prepared.layout.quantized_weights, shape[1], config, device))
    return PROCESS_BYTES + held + max(stages)


def _block_bytes(prepared: Prepared, shape: Sequence[int], config: QuantConfig, *, offloaded: bool) -> int:
    """One block while it is learned, its attention's probabilities for one sample kept (`causal`)."""
    largest = max(sum(p.numel() for p in block.parameters()) for block in prepared.model.blocks)
    streams = 0 if offloaded else (5 + compensates(config)) * stream_bytes(prepared, shape)
    heads: int = prepared.model.skeleton.config.get_text_config().num_attention_heads
    return streams + BYTES_PER_WEIGHT * largest + 4 * heads * shape[1] ** 2 // 2


def _allotting_memory(prepared: Prepared, shape: Sequence[int]) -> int:
    """One block on its way back, or the predictions for one sample."""
    text = prepared.model.skeleton.config.get_text_config()
    largest = max(spec.layout.rows * spec.layout.cols for spec in prepared.layout.linears.values())
    logits: int = 4 * 4 * shape[1] * text.vocab_size
    return max(5 * 4 * largest, logits)


def flops(prepared: Prepared, shape: Sequence[int], config: QuantConfig) -> int:
    """Floating-point operations in the linears: two targets, two measurements, and three products per learning step.

    Compensation in place of learning takes about four: parts of the block on both streams, and moments of its inputs.
    Distillation takes one more product per token: the original's predictions.
    """
    tokens = math.prod(shape) * (4 + 3 * config.epochs + (4 if compensates(config) else 0))
    if config.distill is not Distill.OFF:
        tokens += config.distill_tokens * 4
    return 2 * prepared.layout.quantized_weights * tokens
