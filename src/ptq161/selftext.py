"""Text that a model writes by itself: calibration without any data, or more of the kind there is."""

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.draws import tokens_at
from ptq161.errors import NonFiniteError

_SEQUENCES_AT_ONCE = 64
_CACHE_BYTES = 2**31  # of their keys and values, so that fewer of a large model are written at once


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model's input embedding has."""
    size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    return size


@torch.inference_mode()
def sample_from_model(
    model: PreTrainedModel, bos: int | None, samples: int, seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "samples seq"]:
    """Ancestral samples at temperature 1, on the CPU.

    Each starts after BOS, which is left out (as in windows cut from a file), or at a random token where the model has
    no BOS. An end-of-text token does not end a sample: what follows it starts a new text, as in training.

    Raises NonFiniteError if the model's logits are not finite.
    """
    parts = []
    for count in _batches(model, samples, seqlen):
        if bos is None:
            start = torch.randint(vocabulary_size(model), (count, 1), generator=generator)
            parts.append(_continued(model, start, seqlen, generator))
        else:
            start = torch.full((count, 1), bos)
            parts.append(_continued(model, start, seqlen + 1, generator)[:, 1:])
    return torch.cat(parts).clone()


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    text: Int64[Tensor, "samples seq"],
    count: int,
    generator: torch.Generator,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
) -> Int64[Tensor, "count seq"]:
    """Samples as long as those of a text, that begin with a piece from anywhere in it and go on as the model does.

    The piece is an eighth of the sample, at least one token; the rest is drawn at temperature 1, on the CPU.

    Raises NonFiniteError if the model's logits are not finite.
    """
    samples, seqlen = text.shape
    length = max(seqlen // 8, 1)
    parts, done = [], 0
    for batch in _batches(model, count, seqlen):
        rows = torch.randint(samples, (batch, 1), generator=generator)
        first = torch.randint(seqlen - length + 1, (batch, 1), generator=generator)
        pieces = text.cpu()[rows, first + torch.arange(length)]
        parts.append(_continued(model, pieces, seqlen, generator))
        done += batch
        on_step(done, count)
    return torch.cat(parts).clone()


def _batches(model: PreTrainedModel, samples: int, seqlen: int) -> list[int]:
    """How many samples to write at once, until all are written."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = seqlen * text.num_hidden_layers * 2 * heads * width * 4  # keys and values, in float32 at most
    at_once = max(1, min(_SEQUENCES_AT_ONCE, _CACHE_BYTES // cached))
    return [min(at_once, samples - done) for done in range(0, samples, at_once)]


def _continued(
    model: PreTrainedModel, start: Int64[Tensor, "batch begun"], seqlen: int, generator: torch.Generator
) -> Int64[Tensor, "batch seq"]:
    """The start of each sample and what the model adds to it."""
    tokens, cache = [start], None
    for _ in range(seqlen - start.shape[1]):
        output = model(tokens[-1].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(dim=-1).cpu()
        if not probabilities.isfinite().all():
            raise NonFiniteError(f"{type(model).__name__} gives NaN or infinite logits; it cannot write its own text")
        points = torch.rand(len(probabilities), generator=generator)
        tokens.append(tokens_at(points, probabilities)[:, None])
    return torch.cat(tokens, dim=1)
