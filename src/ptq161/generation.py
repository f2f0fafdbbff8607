"""Continue a prompt and hand the text out as it is written."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ptq161.data import check_length, check_vocabulary
from ptq161.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else sampled from `seed`; at most `max_new_tokens` of them.

    Raises InputError for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        tokens, temperature, top_p, seed = self.max_new_tokens, self.temperature, self.top_p, self.seed
        _check(tokens >= 1, f"max_new_tokens={tokens} is out of range: expected 1 or more")
        _check(
            0 <= temperature < float("inf"), f"temperature={temperature} is out of range: expected 0 (greedy) or more"
        )
        _check(0 < top_p <= 1, f"top_p={top_p} is out of range: expected more than 0 and at most 1")
        _check(-(2**63) <= seed < 2**64, f"seed={seed} is out of range: expected a 64-bit number")


class _Feed(TextStreamer):
    """Passes text on as soon as it is a whole word, and keeps the time of every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with each token."""
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each finished piece of text, empty ones included."""
        if text:
            self.on_text(text)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    cache: Cache | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Continue a prompt of tokens until end of text or `sampling.max_new_tokens`.

    cache: what earlier calls computed of the prompt's first tokens, extended in place.

    Returns text (the continuation), tokens (how many), ids, seconds (all of it), first_token_seconds, and tok_s: tokens
    per second after the first, which also reads the prompt; None when there is no second token.

    Raises InputError for an empty prompt, or one that the model has no room for.
    """
    _check(len(prompt) > 0, "the prompt is empty, and this tokenizer adds no token of its own: give some text")
    inputs = torch.tensor([list(prompt)], dtype=torch.int64)
    check_vocabulary(inputs, model)
    check_length(model, inputs.shape[1] + sampling.max_new_tokens)
    feed = _Feed(tokenizer, on_text)
    began = time.perf_counter()
    with seeded(model, sampling.seed):
        output = model.generate(  # type: ignore[operator]
            inputs.to(model.device),
            attention_mask=torch.ones_like(inputs).to(model.device),
            generation_config=settings(model, tokenizer, sampling),
            streamer=feed,
            **({} if cache is None else {"past_key_values": cache}),
        )
    seconds = time.perf_counter() - began
    written = output[0, inputs.shape[1] :].tolist()
    after_first = feed.times[-1] - feed.times[1]
    return {
        "text": tokenizer.decode(written, skip_special_tokens=True),
        "tokens": len(written),
        "ids": written,
        "seconds": seconds,
        "first_token_seconds": feed.times[1] - began,
        "tok_s": (len(written) - 1) / after_first if len(written) > 1 else None,
    }


@contextmanager
def seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Sample from `seed` on the model's device; the generators outside are left as they were."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The tokens that end a text: the model's and the tokenizer's, which may name others. None if neither names one."""
    defaults = model.generation_config
    named = None if defaults is None else defaults.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(ends) or None


def _check_token_ids(model: PreTrainedModel) -> None:
    """Of the model's generation_config.json, what transformers makes tensors of without a look."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        named = getattr(model.generation_config, name, None)
        ids = named if isinstance(named, list) else [named]
        _check(
            all(index is None or (type(index) is int and 0 <= index < 2**31) for index in ids),
            f"{name}={named!r} of the model's generation_config.json: expected a token id or a list of them",
        )


def settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """What transformers needs to know to write as `sampling` says. Raises InputError for token ids that are none."""
    _check_token_ids(model)
    chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,  # unused in a batch of one
        output_attentions=False,  # whatever the model's own file asks for
        output_hidden_states=False,
        **(chosen if sampling.temperature > 0 else {"do_sample": False}),
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
