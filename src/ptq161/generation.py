"""Continue a prompt and hand the text out as it is written."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ptq161.data import check_length, check_vocabulary
from ptq161.errors import InputError


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
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Continue `prompt` until end of text or `max_new_tokens`: greedily at temperature 0, else sampled from `seed`.

    Returns text (the continuation), tokens, seconds (all of it), first_token_seconds, and tok_s: tokens per second
    after the first, which also reads the prompt; None when there is no second token.

    Raises InputError for arguments out of range, an empty prompt, or one that the model has no room for.
    """
    _check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} is out of range: expected 1 or more")
    _check(temperature >= 0, f"temperature={temperature} is out of range: expected 0 (greedy) or more")
    _check(0 < top_p <= 1, f"top_p={top_p} is out of range: expected more than 0 and at most 1")
    inputs = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.int64)
    _check(inputs.numel() > 0, "the prompt is empty, and this tokenizer adds no token of its own: give some text")
    check_vocabulary(inputs, model)
    check_length(model, inputs.shape[1] + max_new_tokens)
    feed = _Feed(tokenizer, on_text)
    gpus = [model.device] if model.device.type == "cuda" else []
    began = time.perf_counter()
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[operator]
            inputs.to(model.device),
            attention_mask=torch.ones_like(inputs).to(model.device),
            generation_config=_settings(model, tokenizer, max_new_tokens, temperature, top_p),
            streamer=feed,
        )
    seconds = time.perf_counter() - began
    written = output[0, inputs.shape[1] :]
    after_first = feed.times[-1] - feed.times[1]
    return {
        "text": tokenizer.decode(written, skip_special_tokens=True),
        "tokens": len(written),
        "seconds": seconds,
        "first_token_seconds": feed.times[1] - began,
        "tok_s": (len(written) - 1) / after_first if len(written) > 1 else None,
    }


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    defaults = model.generation_config
    end = tokenizer.eos_token_id if defaults is None or defaults.eos_token_id is None else defaults.eos_token_id
    ends = end if isinstance(end, list) else [end]
    _check(
        all(index is None or (type(index) is int and 0 <= index < 2**31) for index in ends),
        f"eos_token_id={end!r} of the model's generation_config.json: expected a token id or a list of them",
    )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,  # unused in a batch of one
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
