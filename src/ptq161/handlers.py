"""transformers' handlers of OpenAI requests, around one model that is already loaded.

`transformers serve` loads whatever a client names, and takes a seed, a temperature or an unknown option lightly. The
handlers here serve one model, and do what a request says or refuse it (docs/decisions/0009-serve.md).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from secrets import randbits
from threading import Event
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState

from ptq161.chat import NO_TEMPLATE
from ptq161.data import check_length
from ptq161.errors import InputError
from ptq161.generation import Sampling, seeded, settings

# Fields that the handlers do not know, or know and ignore, with the values that change nothing; others are refused.
# What is in none of the lists has no influence on the answer (user, metadata, store, ...).
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "generation_config": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Served:
    """A loaded model and what clients call it. `stopping` ends the answer being written.

    Raises InputError for a tokenizer that cannot decode token by token.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    created: int = field(default_factory=lambda: int(time.time()))
    stopping: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError(f"{self.name}: its tokenizer is not of the tokenizers library, which serving needs")


class Stopping(Exception):
    """The server was told to stop while it wrote an answer."""


class _Writer:
    """Stands in for the model in one request: samples from the request's own seed, and can be stopped."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served, self.seed = served, seed
        self.config, self.device = served.model.config, served.model.device
        self.generation_config = served.model.generation_config

    def generate(self, *, generation_config: GenerationConfig, **inputs: Any) -> Tensor:
        """As the model's own, in the thread that writes one answer after the other."""
        try:
            self._stop_if_told()
            check_length(self.served.model, inputs["input_ids"].shape[1] + generation_config.max_new_tokens)
            with seeded(self.served.model, self.seed):
                written: Tensor = self.served.model.generate(  # type: ignore[operator]
                    generation_config=generation_config, stopping_criteria=[self._after_token], **inputs
                )
            return written
        except Exception as error:
            if "streamer" not in inputs or not str(error):  # none: the client hung up
                raise
            # The handlers put the message between quotes without escaping it (serve.py finds it there).
            message = " ".join(str(error).split()).replace("\\", "/").replace('"', "'")
            raise RuntimeError(message) from error

    def _after_token(self, tokens: Tensor, scores: object, **_: Any) -> Tensor:
        self._stop_if_told()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def _stop_if_told(self) -> None:
        if self.served.stopping.is_set():
            raise Stopping("the server is shutting down")


class _OneModel(BaseHandler):
    """What the three handlers below have in common. `prompt`: the field that holds it."""

    prompt: str

    def __init__(self, served: Served, state: GenerationState) -> None:
        super().__init__(ModelManager(device="cpu"), state)  # loads nothing; the handlers ask it what kind a model is
        self.served = served

    def _validate_request(self, body: dict[str, Any]) -> None:
        if body.get("max_completion_tokens") is not None:  # transformers before 5.23 only knows its older name
            body["max_tokens"] = body.pop("max_completion_tokens")
        super()._validate_request(body)
        for name in sorted(body.keys() & (self._unused_fields | {"generation_config"}) & WITHOUT_EFFECT.keys()):
            if body[name] is not None and body[name] not in WITHOUT_EFFECT[name]:
                raise HTTPException(400, f"{name} = {body[name]!r} is not supported: leave it out")
        if not body.get(self.prompt):
            raise HTTPException(400, f"{self.prompt} is missing or empty")
        body.setdefault("stream", False)  # /v1/responses would stream

    def _resolve_model(self, body: dict[str, Any]) -> Any:  # (name, model, tokenizer); the model is a stand-in
        name = self.served.name
        if body.setdefault("model", name) != name:
            raise HTTPException(404, f"there is no model {body['model']!r}: this server has {name!r}")
        seed = body.pop("seed", None)  # transformers would seed here, not where the answer is written
        if seed is not None and type(seed) is not int:
            raise HTTPException(400, f"seed = {seed!r}: expected a whole number")
        return (
            name,
            _Writer(self.served, randbits(63) if seed is None else Sampling(seed=seed).seed),
            self.served.tokenizer,
        )

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        """The model's own settings under those of the request; sampling only from a temperature above 0."""
        config: GenerationConfig = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        temperature = 1.0 if config.temperature is None else config.temperature
        if body.get("temperature") is None and not config.do_sample:
            temperature = 0.0
        top_p = 1.0 if config.top_p is None else config.top_p
        chosen = settings(self.served.model, self.served.tokenizer, Sampling(config.max_new_tokens, temperature, top_p))
        for name in ("do_sample", "temperature", "top_p", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(chosen, name))
        config.top_k = chosen.top_k if config.top_k is None else config.top_k
        return config


class _Conversation(_OneModel):
    """A handler that needs the chat template."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        template = self.served.tokenizer.chat_template
        if template is None:
            raise HTTPException(400, f"{NO_TEMPLATE}; use /v1/completions")
        if body.get("tools") and "tools" not in str(template):
            raise HTTPException(400, "the chat template of this model knows no tools: leave them out")


class ChatCompletions(_Conversation, ChatCompletionHandler):
    """/v1/chat/completions."""

    prompt = "messages"


class Completions(_OneModel, CompletionHandler):
    """/v1/completions."""

    prompt = "prompt"


class Responses(_Conversation, ResponseHandler):
    """/v1/responses."""

    prompt = "input"
