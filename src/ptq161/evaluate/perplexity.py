"""Perplexity of a causal language model over windows of a token sequence, as the quantization literature counts it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ptq161 import ranks
from ptq161.data import check_length, check_vocabulary
from ptq161.errors import InputError, NonFiniteError

_POSITIONS_AT_ONCE = 256  # float32 copies of the logits: 256 x 128k tokens of vocabulary are 131 MB


def perplexity(
    model: PreTrainedModel,
    tokens: Int64[Tensor, " tokens"],
    seqlen: int,
    *,
    bos: int | None = None,
    max_windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Cut the tokens into non-overlapping windows of `seqlen`, drop the shorter tail, and average over all windows.

    In each window, every token but the first is predicted from those before it: `tokens` = windows * (seqlen - 1) and
    ppl = exp(sum of their negative log likelihoods / tokens), summed in float64 from float32 logits. With `bos`, that
    token stands before each window; the same tokens are predicted, so that both figures compare.

    Of several ranks each does its share of the windows, and all return the same.

    on_window: called with (windows done, windows in all) after each one of this rank.
    Returns {"ppl", "tokens", "windows", "seqlen", "bos"}.

    Raises InputError if there is not one whole window, or if the model lacks the tokens or positions; NonFiniteError
    naming the first window with a result that is not finite.
    """
    if seqlen < 2:
        raise InputError(f"seqlen={seqlen} is out of range: expected 2 or more")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"max_windows={max_windows} is out of range: expected 1 or more")
    windows = len(tokens) // seqlen
    if windows == 0:
        raise InputError(f"the text has {len(tokens)} tokens, less than one window of {seqlen}: use a smaller --seqlen")
    windows = windows if max_windows is None else min(windows, max_windows)
    check_length(model, seqlen)
    check_vocabulary(tokens, model)
    was_training = model.training
    model.eval()  # dropout would be measured, too
    total = 0.0
    own = ranks.share(tokens[: windows * seqlen].view(windows, seqlen))
    try:
        for index, window in enumerate(own):
            total += _window_nll(model, window.to(model.device), bos)
            if not math.isfinite(total):
                window_index = ranks.rank() + index * ranks.count()
                raise NonFiniteError(
                    f"perplexity is not finite from window {window_index} on: the model's logits overflow"
                )
            if on_window is not None:
                on_window(index + 1, len(own))
    finally:
        model.train(was_training)
    (total,) = ranks.total(total)
    predicted = windows * (seqlen - 1)
    try:
        ppl = math.exp(total / predicted)
    except OverflowError as error:
        raise NonFiniteError(f"perplexity is not finite: mean negative log likelihood {total / predicted}") from error
    return {"ppl": ppl, "tokens": predicted, "windows": windows, "seqlen": seqlen, "bos": bos}


@torch.inference_mode()
def _window_nll(model: PreTrainedModel, window: Int64[Tensor, " seqlen"], bos: int | None) -> float:
    """Negative log likelihood, in nats, of every token of the window but the first."""
    inputs, targets = window[:-1], window[1:]
    if bos is not None:
        inputs = torch.cat([inputs.new_tensor([bos]), inputs])
    logits: Float[Tensor, "predicted vocabulary"] = model(input_ids=inputs[None], use_cache=False).logits[0]
    pairs = zip(logits[-len(targets) :].split(_POSITIONS_AT_ONCE), targets.split(_POSITIONS_AT_ONCE), strict=True)
    return sum(float(cross_entropy(part.float(), wanted, reduction="none").double().sum()) for part, wanted in pairs)
