"""The block-wise stage of a run: the budget divided, block after block quantized, each on disk before the next."""

from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor

from ptq161 import ranks
from ptq161.checkpoint import WorkFolder
from ptq161.config import Distill, QuantConfig
from ptq161.layout import ModelLayout
from ptq161.records import fingerprint
from ptq161.space import Space
from ptq161.walk import OnProgress, Prepared, QuantizedBlock, allot, asks_for_harms, walk


def divided_layout(
    work: WorkFolder,
    prepared: Prepared,
    tokens: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    space: Space,
    on_progress: OnProgress,
) -> ModelLayout:
    """How the bit budget is divided: as an interrupted run had it, or measured now. Raises what `walk.allot` does."""
    if not asks_for_harms(config):
        return prepared.layout
    layout = ranks.from_first(work.load_layout)
    if layout is None:
        scratch = Space(space.folder or work.path)
        measured = allot(prepared, tokens, config, device, scratch, on_progress).layout
        layout = ranks.from_first(lambda: measured)
        ranks.from_first(partial(work.save_layout, layout))
    return layout


def quantize_blocks(
    work: WorkFolder,
    prepared: Prepared,
    tokens: Int64[Tensor, "samples seq"],
    config: QuantConfig,
    device: torch.device,
    space: Space,
    on_progress: OnProgress,
) -> None:
    """Quantize the blocks that `work` does not have yet. Raises NonFiniteError, or OSError if they cannot be kept."""
    for block in walk(prepared, tokens, config, device, work.load_streams(space), on_progress, space):
        ranks.check_same(f"the codes and scales of block {block.index}", fingerprint(block.packed))
        ranks.from_first(partial(_save, work, block, config))
        work.save_streams(block.streams)
        del block  # the next one comes without this one's latents


def _save(work: WorkFolder, block: QuantizedBlock, config: QuantConfig) -> None:
    work.save_block(block.index, block.packed, block.record)
    if config.distill is not Distill.OFF and block.latents:
        work.save_latents(block.index, block.latents)
