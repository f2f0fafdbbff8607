"""A conversation: what the model sees, what stops it, and the command as people and scripts use it."""

import io
import json
import os
import pty
import signal
import sys
import time
from dataclasses import replace

import pytest
from families import FAMILIES, build

from ptq161 import cli
from ptq161.chat import Conversation, converse, prompt_tokens
from ptq161.errors import InputError
from ptq161.generation import Sampling, stream

ANY_TIME = {"seconds": 0, "first_token_seconds": 0, "tok_s": 0}
QUESTIONS = ["The river holds", "Why?", "And the stone of the garden"]


def alone(model, tokenizer, messages, sampling):
    """The answer computed from nothing but the messages."""
    return stream(model, tokenizer, prompt_tokens(tokenizer, messages), sampling)["text"]


@pytest.fixture(scope="module")
def llama():
    return build(FAMILIES["llama"]())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "falcon-alibi"])
def test_answers_see_the_whole_conversation(family, chat_tokenizer):
    """Also where windows slide, and where the history is not what was written before."""
    model, sampling = build(FAMILIES[family]()), Sampling(max_new_tokens=12)
    conversation = Conversation(model, chat_tokenizer, sampling, system="Be brief")
    for question in QUESTIONS:
        messages = [*conversation.messages, {"role": "user", "content": question}]
        answer = conversation.answer(question)
        assert answer["text"] == alone(model, chat_tokenizer, messages, sampling)
        assert not answer["stopped"] and 1 <= answer["tokens"] <= 12
        assert conversation.messages == [*messages, {"role": "assistant", "content": answer["text"]}]
        conversation.messages[-1]["content"] = "no"
    assert conversation.messages[0] == {"role": "system", "content": "Be brief"}


def test_earlier_turns_are_not_computed_again(llama, chat_tokenizer, monkeypatch):
    conversation = Conversation(llama, chat_tokenizer, Sampling(max_new_tokens=4))
    lengths = []
    embed = llama.model.embed_tokens
    monkeypatch.setattr(
        embed, "forward", lambda ids: (lengths.append(ids.shape[1]), type(embed).forward(embed, ids))[1]
    )
    conversation.answer("The river holds the stone")
    first = lengths[0]
    lengths.clear()
    conversation.messages[-1]["content"] = "x" * 4
    conversation.answer("Why?")
    assert 4 < lengths[0] < first


def test_a_question_asked_twice_is_sampled_anew(llama, chat_tokenizer):
    def two_answers(seed):
        conversation = Conversation(llama, chat_tokenizer, Sampling(12, temperature=1.0, seed=seed))
        first = conversation.answer("Why?")["text"]
        conversation.restart()
        return first, conversation.answer("Why?")["text"]

    question = [{"role": "user", "content": "Why?"}]
    assert two_answers(3) == two_answers(3)
    assert two_answers(3)[0] == alone(llama, chat_tokenizer, question, Sampling(12, temperature=1.0, seed=3))
    assert two_answers(3)[1] == two_answers(4)[0] != two_answers(3)[0]


def test_a_stopped_answer_stays_in_the_history(llama, chat_tokenizer):
    sampling = Sampling(max_new_tokens=60, temperature=1.0, seed=4)  # of which the second answer has a space
    conversation, whole = (Conversation(llama, chat_tokenizer, sampling) for _ in range(2))
    pieces = []

    def press(text):
        pieces.append(text)
        raise KeyboardInterrupt

    assert conversation.answer("The river") | ANY_TIME == whole.answer("The river") | ANY_TIME
    stopped = conversation.answer("Why?", press)
    assert stopped["stopped"] and stopped["tokens"] is None and stopped["tok_s"] is None
    assert [stopped["text"]] == pieces
    complete = whole.answer("Why?")["text"]
    assert complete.startswith(stopped["text"]) and len(complete) > len(stopped["text"])
    messages = [*conversation.messages, {"role": "user", "content": "And?"}]
    assert messages[-2]["content"] == stopped["text"]
    expected = alone(llama, chat_tokenizer, messages, replace(sampling, seed=4 + 2))
    assert conversation.answer("And?")["text"] == expected


def test_it_ends_where_the_tokenizer_says_so(llama, chat_tokenizer):
    """Models made for chat sometimes name only the end of a document in their generation settings."""
    conversation = Conversation(llama, chat_tokenizer, Sampling(max_new_tokens=12))
    first = next(character for character in conversation.answer("The river")["text"] if character.isalnum())
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer, eos_token=first)
    tokenizer.chat_template = chat_tokenizer.chat_template
    ended = Conversation(llama, tokenizer, Sampling(max_new_tokens=12)).answer("The river")
    assert ended["tokens"] < 12


def test_no_chat_template(llama, tokenizer):
    with pytest.raises(InputError, match="has no chat template: this model was not made for conversations"):
        Conversation(llama, tokenizer, Sampling())


def test_a_template_without_system_messages(llama, chat_tokenizer):
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    Conversation(llama, tokenizer, Sampling())
    with pytest.raises(InputError, match="the chat template refuses these messages: no system role"):
        Conversation(llama, tokenizer, Sampling(), system="Be brief")


def test_no_room_leaves_the_history(chat_tokenizer):
    conversation = Conversation(build(FAMILIES["opt"]()), chat_tokenizer, Sampling(max_new_tokens=20))
    conversation.answer("The river")
    before = list(conversation.messages)
    with pytest.raises(InputError, match="has 128 positions"):
        conversation.answer("x" * 100)
    assert conversation.messages == before


# The loop


@pytest.fixture
def script(llama, chat_tokenizer):
    """Run the loop over lines and exceptions: (answers, what was shown, notes)."""

    def run(*events, **settings):
        left, shown, notes = list(events), [], []

        def read():
            event = left.pop(0)
            if isinstance(event, str):
                return event
            raise event

        def on_text(text):
            if left and left[0] is KeyboardInterrupt and settings.get("while_writing"):
                raise left.pop(0)
            shown.append(text)

        conversation = Conversation(llama, chat_tokenizer, Sampling(max_new_tokens=settings.get("tokens", 4)))
        answers = converse(conversation, read, on_text, lambda answer: shown.append("\n"), notes.append)
        assert not left
        return answers, "".join(shown), notes

    return run


@pytest.mark.parametrize("end", ["/exit", " /exit \n", EOFError])
def test_the_loop_ends(script, end):
    answers, shown, notes = script("Why?\n", "", "  ", "The river", end)
    assert [answer["question"] for answer in answers] == ["Why?", "The river"]
    assert shown == "".join(f"{answer['text']}\n" for answer in answers)
    assert notes == []


def test_two_interrupts_at_the_prompt_end_it_and_one_does_not(script):
    answers, _, notes = script(KeyboardInterrupt, "Why?", KeyboardInterrupt, KeyboardInterrupt)
    assert len(answers) == 1
    assert notes == ["Ctrl-C again, Ctrl-D or /exit ends the conversation"] * 2


def test_an_interrupt_stops_the_answer_and_the_next_one_ends(script):
    answers, shown, notes = script("The river", KeyboardInterrupt, KeyboardInterrupt, while_writing=True)
    assert [answer["stopped"] for answer in answers] == [True]
    assert (shown, notes) == ("\n", [])


def test_new_forgets(script):
    answers, _, _ = script("Why?", "The river", "/new", "Why?", EOFError)
    assert answers[0]["text"] == answers[2]["text"]


def test_a_conversation_longer_than_the_model_was_made_for_is_said(script):
    _, _, notes = script("x" * 90, "y" * 60, "/new", "Why?", EOFError)
    assert notes == ["the conversation is longer than the texts this model was made for; /new starts another"]


# The command


@pytest.fixture
def chat(capsys, monkeypatch):
    """Run the command with these lines piped into it: (exit code, stdout, lines of stderr)."""

    def run(folder, lines, *words):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        status = cli.main(["chat", str(folder), "--device", "cpu", *words])
        out, err = capsys.readouterr()
        return status, out, err.splitlines()

    return run


def test_piped(chat, chat_folder):
    words = ["--max-new-tokens", "6", "--system", "Be brief"]
    status, out, err = chat(chat_folder, b"Why?\n\nThe river\n", *words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["model"], found["system"]) == (str(chat_folder), "Be brief")
    assert [answer["question"] for answer in found["answers"]] == ["Why?", "The river"]
    keys = {"question", "text", "tokens", "seconds", "first_token_seconds", "tok_s", "stopped"}
    assert all(answer.keys() == keys for answer in found["answers"])
    assert len(err) == 2 and all(" tokens in " in line for line in err)
    status, out, err = chat(chat_folder, b"Why?\nThe river", *words, "--quiet")
    assert (status, err) == (0, [])
    assert out == "".join(f"{answer['text']}\n" for answer in found["answers"])


def test_piped_bytes_that_are_no_text(chat, chat_folder):
    status, out, err = chat(chat_folder, b"\xff\xfe\n")
    assert (status, out, err) == (2, "", ["ptq161: error: standard input is not UTF-8 text"])


def test_a_model_without_template_is_refused(chat, llama_folder):
    status, out, err = chat(llama_folder, b"Why?\n")
    assert (status, out) == (2, "")
    assert len(err) == 1 and "the tokenizer has no chat template" in err[0]


def test_settings_out_of_range_are_refused_before_the_model_is_read(chat):
    status, _, err = chat("no/such/folder", b"", "--temperature", "-1")
    assert status == 2 and "temperature=-1.0 is out of range" in err[-1]


def test_interrupts_on_a_terminal(started, tmp_path, chat_tokenizer):
    """Ctrl-C during an answer that never ends, then at the prompt."""
    config = FAMILIES["llama"]()
    config.eos_token_id = None
    build(config).save_pretrained(tmp_path)
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    ours, theirs = pty.openpty()
    options = ["--max-new-tokens", "1000000", "--temperature", "1", "--device", "cpu"]
    process = started("chat", tmp_path, *options, stdin=theirs, stdout=theirs, stderr=theirs)
    seen, limit = "", time.monotonic() + 120

    def wait_for(what):
        nonlocal seen
        while what not in seen:
            assert time.monotonic() < limit and process.poll() is None, seen
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(what)[2]

    wait_for("> ")
    os.write(ours, b"Why?\n")
    wait_for("Why?\r\n")
    wait_for(" ")  # a first word
    process.send_signal(signal.SIGINT)
    wait_for("stopped")
    wait_for("> ")
    process.send_signal(signal.SIGINT)
    os.write(ours, b"\n")  # a signal between the prompt and the wait for a key is only noticed with the next key
    assert process.wait(timeout=120) == 0
    os.close(theirs)
    os.close(ours)
