"""A conversation with a model: its history, and the loop from one question to the next."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from textwrap import shorten
from typing import Any

from jinja2 import TemplateError
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ptq161.errors import InputError
from ptq161.generation import Sampling, stream

NO_TEMPLATE = "the tokenizer has no chat template: this model was not made for conversations"
LEAVE, ANEW = "/exit", "/new"
HINT = f"Ctrl-C stops an answer, {ANEW} forgets the conversation, Ctrl-D or {LEAVE} ends it"


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Messages (role, content) in the tokenizer's chat template, ready for the assistant's answer.

    Raises InputError if there is no template, or it refuses the messages (some know no system message).
    """
    if tokenizer.chat_template is None:
        raise InputError(NO_TEMPLATE)
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"the chat template refuses these messages: {reason}") from error
    return list(encoded["input_ids"])


class Conversation:
    """Questions and answers so far. Answers see all of it; what was computed for earlier ones is kept.

    The seed counts up with every answer, so that a question asked twice can be answered in two ways. `overlong`: the
    last answer went past the positions that the model was made for.

    Raises InputError if the tokenizer has no chat template or the template takes no system message.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, system: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.beginning = [] if system is None else [{"role": "system", "content": system}]
        prompt_tokens(tokenizer, [*self.beginning, {"role": "user", "content": "?"}])
        self.answers = 0
        self.computed: list[int] = []  # the tokens that the cache holds
        self.restart()

    def restart(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = list(self.beginning)
        self.overlong = False
        self._forget()

    def answer(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """What `generation.stream` returns for this question, and `stopped`; both become part of the history.

        Ctrl-C (KeyboardInterrupt) stops the answer: the text is then what was handed out, `stopped` is True, and what
        was not measured is None.

        Raises InputError, and leaves the history, if the model has no room for more.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        tokens = prompt_tokens(self.tokenizer, messages)
        pieces: list[str] = []

        def hand_out(text: str) -> None:
            pieces.append(text)
            on_text(text)

        self._keep_beginning_of(tokens)
        sampling = replace(self.sampling, seed=self.sampling.seed + self.answers)
        try:
            result = stream(self.model, self.tokenizer, tokens, sampling, cache=self.cache, on_text=hand_out)
        except KeyboardInterrupt:
            self._forget()  # some layers may have seen a token more than others
            unknown = dict.fromkeys(("tokens", "seconds", "first_token_seconds", "tok_s"))
            result = {"text": "".join(pieces), **unknown, "stopped": True}
        else:
            self.computed = (tokens + result.pop("ids"))[: self.cache.get_seq_length()]
            result["stopped"] = False
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.overlong = positions is not None and len(tokens) + (result["tokens"] or 0) > positions
        self.answers += 1
        self.messages = [*messages, {"role": "assistant", "content": result["text"]}]
        return result

    def _forget(self) -> None:
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.computed = []

    def _keep_beginning_of(self, tokens: list[int]) -> None:
        """Cut the cache to the tokens it shares with these. At least the last one is left to be computed."""
        limit = min(len(self.computed), len(tokens) - 1)
        shared = next((index for index in range(limit) if self.computed[index] != tokens[index]), limit)
        surplus = len(self.computed) - shared
        if surplus and not all(type(layer) is DynamicLayer for layer in self.cache.layers):
            self._forget()  # sliding windows have dropped what they would need again
        elif surplus:
            self.cache.crop(-surplus)
            self.computed = self.computed[:shared]


def converse(
    conversation: Conversation,
    read: Callable[[], str],
    on_text: Callable[[str], None],
    on_answer: Callable[[Mapping[str, Any]], None],
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Answer every line that `read` returns until EOFError, /exit, or two Ctrl-C in a row; /new starts afresh.

    on_text gets an answer in pieces, on_answer all of it, note what is no answer. Returns the answers, each with its
    `question`.
    """
    answered: list[dict[str, Any]] = []
    interrupted = False
    while True:
        try:
            question = read().strip()
            if question == LEAVE:
                return answered
            if question == ANEW:
                conversation.restart()
            elif question:
                answer = conversation.answer(question, on_text)
                answered.append({"question": question, **answer})
                on_answer(answer)
                if conversation.overlong:
                    note(f"the conversation is longer than the texts this model was made for; {ANEW} starts another")
                interrupted = answer["stopped"]
                continue
            interrupted = False
        except EOFError:
            return answered
        except KeyboardInterrupt:
            if interrupted:
                return answered
            interrupted = True
            note(f"Ctrl-C again, Ctrl-D or {LEAVE} ends the conversation")
