"""Text that a model writes by itself: calibration without any data."""

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161.errors import NonFiniteError

_SEQUENCES_AT_ONCE = 16  # bounds the key-value cache


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
    for done in range(0, samples, _SEQUENCES_AT_ONCE):
        batch = min(_SEQUENCES_AT_ONCE, samples - done)
        if bos is None:
            start = torch.randint(vocabulary_size(model), (batch, 1), generator=generator)
            parts.append(torch.cat([start, _continue(model, start, seqlen - 1, generator)], dim=1))
        else:
            parts.append(_continue(model, torch.full((batch, 1), bos), seqlen, generator))
    return torch.cat(parts).clone()


def _continue(
    model: PreTrainedModel, start: Int64[Tensor, "batch 1"], length: int, generator: torch.Generator
) -> Int64[Tensor, "batch length"]:
    tokens, cache = [start], None
    for _ in range(length):
        output = model(input_ids=tokens[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(dim=-1).cpu()
        if not probabilities.isfinite().all():
            raise NonFiniteError(f"{type(model).__name__} gives NaN or infinite logits; it cannot write its own text")
        tokens.append(torch.multinomial(probabilities, num_samples=1, generator=generator))
    return torch.cat(tokens[1:], dim=1)
