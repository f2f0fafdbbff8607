"""The server as OpenAI's own client sees it, on loopback."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from families import FAMILIES, build

from ptq161 import cli
from ptq161.chat import Conversation
from ptq161.errors import InputError
from ptq161.generation import Sampling, stream
from ptq161.handlers import Served
from ptq161.linear import PackedLinear
from ptq161.serve import Server, listen, name_of, url_of
from ptq161.sources import open_model

WHY = [{"role": "user", "content": "Why?"}]
RIVER = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "The river"}]


@contextmanager
def serving(model, tokenizer, name="tiny-chat"):
    """(client, server) of a server in another thread."""
    with listen("127.0.0.1", 0) as listener:
        server = Server(Served(name, model, tokenizer), access_log=False)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with openai.OpenAI(base_url=url_of(listener), api_key="any", max_retries=0, timeout=60) as client:
                yield client, server
        finally:
            server.handle_exit(signal.SIGINT, None)
            thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def packed(chat_folder):
    """(model, tokenizer) of a packed tiny Llama, kept packed, with int8 activations."""
    model, tokenizer = open_model(chat_folder, mode="packed")
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    return model, tokenizer


@pytest.fixture(scope="module")
def client(packed):
    with serving(*packed) as (client, _):
        yield client


@pytest.fixture(scope="module")
def endless(chat_tokenizer):
    """(model, tokenizer) that never end a text."""
    model = build(FAMILIES["llama"]())
    model.generation_config.eos_token_id = None
    tokenizer = type(chat_tokenizer)(tokenizer_object=chat_tokenizer.backend_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template
    return model, tokenizer


def expected(packed, messages, **sampling):
    """The answer of `ptq161 chat` to the same messages."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    return Conversation(*packed, Sampling(**sampling), system).answer(messages[-1]["content"])


def chat(client, messages, **more):
    return client.chat.completions.create(model="tiny-chat", messages=messages, **more)


def test_the_model_has_a_name(client):
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").owned_by == "ptq161"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt': this server has 'tiny-chat'"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_chat(client, packed, limit):
    answer = chat(client, RIVER, **{limit: 9})
    wanted = expected(packed, RIVER, max_new_tokens=9)
    assert answer.choices[0].message.content == wanted["text"]
    assert (answer.model, answer.usage.completion_tokens) == ("tiny-chat", wanted["tokens"])
    assert answer.choices[0].finish_reason == ("length" if wanted["tokens"] == 9 else "stop")


def streamed(client, messages, **more):
    """(text, reason of the end, pieces) of a streamed answer."""
    chunks = list(chat(client, messages, stream=True, **more))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    return "".join(pieces), chunks[-1].choices[0].finish_reason, len(pieces)


def test_chat_streams(client, packed):
    wanted = expected(packed, WHY, max_new_tokens=9)
    text, reason, pieces = streamed(client, WHY, max_tokens=9)
    assert (text, reason) == (wanted["text"], "length" if wanted["tokens"] == 9 else "stop")
    assert pieces > 1


def test_two_clients_at_once(client, packed):
    """Each gets its own answer, sampled from its own seed, whatever the other asks for meanwhile."""
    requests = {
        (name, seed): {"messages": messages, "temperature": temperature, "max_tokens": 16, "seed": seed}
        for name, messages in (("why", WHY), ("river", RIVER))
        for seed, temperature in ((1, 0.0), (2, 1.0))
    }
    wanted = {
        key: expected(packed, r["messages"], max_new_tokens=16, temperature=r["temperature"], seed=r["seed"])["text"]
        for key, r in requests.items()
    }
    assert len(set(wanted.values())) == len(wanted)
    together, got = threading.Barrier(2), {}

    def ask(name):
        with openai.OpenAI(base_url=client.base_url, api_key=name, max_retries=0) as own:
            for key in [key for key in requests if key[0] == name]:
                together.wait(timeout=60)
                got[key] = streamed(own, **requests[key])[0]

    threads = [threading.Thread(target=ask, args=[name]) for name in ("why", "river")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert got == wanted


def test_without_a_seed_answers_differ_and_without_a_temperature_they_do_not(client):
    sampled = {chat(client, WHY, temperature=1.0, max_tokens=20).choices[0].message.content for _ in range(2)}
    greedy = {chat(client, WHY, max_tokens=8).choices[0].message.content for _ in range(2)}
    assert (len(sampled), len(greedy)) == (2, 1)


def test_the_generators_outside_are_left_alone(client):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    chat(client, WHY, temperature=1.0, seed=7, max_tokens=4)
    assert torch.equal(torch.rand(3), wanted)


def test_completions(client, packed):
    prompt = packed[1]("The river")["input_ids"]
    wanted = stream(*packed, prompt, Sampling(max_new_tokens=9))["text"]
    request = {"model": "tiny-chat", "prompt": "The river", "max_tokens": 9}
    assert client.completions.create(**request).choices[0].text == wanted
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)) == wanted


def test_responses(client, packed):
    wanted = expected(packed, RIVER, max_new_tokens=9)["text"]
    request = {"model": "tiny-chat", "instructions": "Be brief", "input": "The river", "max_output_tokens": 9}
    assert client.responses.create(**request).output_text == wanted
    events = list(client.responses.create(**request, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted


def test_a_word_that_stops(client, packed):
    whole = expected(packed, WHY, max_new_tokens=20)["text"]
    answer = chat(client, WHY, max_tokens=20, stop=[whole[5]]).choices[0]
    assert answer.message.content == whole[: whole.index(whole[5]) + 1]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "kind", "says"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "there is no model 'gpt': this server has 'tiny-chat'"),
        ({"n": 2}, openai.BadRequestError, "n = 2 is not supported: leave it out"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs = True is not supported"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format = .* is not supported"),
        ({"extra_body": {"generation_config": "{}"}}, openai.BadRequestError, "generation_config = .* not supported"),
        ({"extra_body": {"top_k": 5}}, openai.UnprocessableEntityError, "Unexpected fields in the request: .*top_k"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "knows no tools"),
        ({"temperature": -1.0}, openai.BadRequestError, "temperature=-1.0 is out of range"),
        ({"top_p": 0.0}, openai.BadRequestError, "top_p=0.0 is out of range"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_new_tokens=0 is out of range"),
        ({"seed": 2**70}, openai.BadRequestError, "seed=1180591620717411303424 is out of range"),
        ({"seed": "one"}, openai.BadRequestError, "seed = 'one': expected a whole number"),
        ({"messages": []}, openai.BadRequestError, "messages is missing or empty"),
        ({"messages": [{"content": "x"}]}, openai.BadRequestError, "cannot be understood: KeyError: 'role'"),
    ],
)
def test_what_cannot_be_done_is_refused(client, more, kind, says):
    with pytest.raises(kind, match=says) as error:
        client.chat.completions.create(**{"model": "tiny-chat", "messages": WHY, "max_tokens": 4} | more)
    assert error.value.body["type"] == "invalid_request_error"


def test_options_at_their_neutral_values_are_no_hindrance(client):
    neutral = {"n": 1, "presence_penalty": 0, "logprobs": False, "response_format": {"type": "text"}, "user": "me"}
    assert chat(client, WHY, max_tokens=2, stop=None, stream_options=None, **neutral).choices[0].message.content


def test_bodies_and_paths_that_make_no_sense(client):
    base = str(client.base_url)
    for content in (b"", b"{", b"[1]"):
        reply = httpx.post(f"{base}chat/completions", content=content, headers={"Content-Type": "application/json"})
        expected = "expected a JSON object, sent as Content-Type: application/json"
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, expected)
    assert httpx.get(f"{base}nothing").json()["error"]["message"] == "Not Found"
    assert httpx.post(base.replace("/v1", "/load_model"), json={"model": "gpt2"}).status_code == 404


def test_streams_end_as_openai_ends_them(client):
    base, body = str(client.base_url), {"messages": WHY, "prompt": "The", "max_tokens": 2, "stream": True}
    for path, prompt in (("chat/completions", "messages"), ("completions", "prompt")):
        sent = {key: body[key] for key in (prompt, "max_tokens", "stream")}
        lines = httpx.post(f"{base}{path}", json=sent, timeout=60).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        assert json.loads(lines[-3].removeprefix("data: "))["usage"]["completion_tokens"] <= 2


def test_without_a_chat_template_there_are_only_completions(packed, tokenizer):
    with serving(packed[0], tokenizer) as (client, _):
        with pytest.raises(openai.BadRequestError, match=r"has no chat template.*; use /v1/completions"):
            chat(client, WHY)
        assert client.completions.create(model="tiny-chat", prompt="The", max_tokens=3).usage.completion_tokens <= 3


def test_no_room_is_said_to_both_kinds_of_clients(chat_tokenizer):
    with serving(build(FAMILIES["opt"]()), chat_tokenizer) as (client, _):
        with pytest.raises(openai.BadRequestError, match="OPTForCausalLM has 128 positions"):
            chat(client, WHY)
        with pytest.raises(openai.APIError, match="OPTForCausalLM has 128 positions"):
            streamed(client, WHY)


def test_a_client_that_hangs_up_frees_the_model(endless):
    with serving(*endless) as (client, _):
        answer = chat(client, WHY, stream=True, max_tokens=1_000_000)
        next(iter(answer))
        answer.close()
        assert chat(client, WHY, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_shutting_down_ends_the_answer_and_says_so(endless, stream):
    with serving(*endless) as (client, server):
        ended = []

        def ask():
            try:
                for _ in chat(client, WHY, max_tokens=1_000_000, temperature=1.0, stream=stream):
                    pass
            except openai.APIError as error:
                ended.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        limit = time.monotonic() + 60
        while not server.server_state.tasks and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.3)  # until it writes
        server.handle_exit(signal.SIGINT, None)
        thread.join(timeout=60)
    assert len(ended) == 1 and "the server is shutting down" in ended[0]


# From the socket to the command


def test_addresses_that_cannot_be_listened_on():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1 port 0: "):
        listen("192.0.2.1", 0)
    with pytest.raises(InputError, match="cannot listen on no such host port 0: "):
        listen("no such host", 0)


def test_urls_and_names(tmp_path):
    if socket.has_ipv6:
        with listen("::1", 0) as listener:
            assert url_of(listener) == f"http://[::1]:{listener.getsockname()[1]}/v1"
    (tmp_path / "model.Q4.gguf").touch()
    assert name_of(str(tmp_path / "model.Q4.gguf")) == "model.Q4"
    (tmp_path / "sub").mkdir()
    assert name_of(f"{tmp_path}/sub/..") == tmp_path.name
    assert name_of("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "no/such/folder"]) == 2
    line = 'ptq161: error: this command needs fastapi, uvicorn: pip install "ptq161[serve]"\n'
    assert capsys.readouterr() == ("", line)


def test_the_command(chat_folder, started):
    """A process of its own: says where it listens, answers, and ends with code 0 on Ctrl-C."""
    words = ["serve", chat_folder, "--port", "0", "--mode", "packed", "--activations", "float32", "--device", "cpu"]
    process = started(*words, "--name", "mine", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ready = json.loads(process.stdout.readline())
    assert ready["model"] == "mine"
    with openai.OpenAI(base_url=ready["url"], api_key="any", max_retries=0, timeout=60) as client:
        exact = open_model(chat_folder, mode="packed", activations="float32")
        answer = client.chat.completions.create(model="mine", messages=WHY, max_tokens=9)
        assert answer.choices[0].message.content == expected(exact, WHY, max_new_tokens=9)["text"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="tiny-chat", messages=WHY)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].endswith('"POST /v1/chat/completions HTTP/1.1" 200') and lines[1].endswith(" 404")


@pytest.mark.model
def test_a_real_model_answers_two_clients(smollm2_gguf):
    opened = open_model(smollm2_gguf)
    questions = ["What is the capital of France?", "What is the capital of Italy?"]
    messages = {question: [{"role": "user", "content": question}] for question in questions}
    got = {}
    with serving(*opened) as (client, _):

        def ask(question):
            got[question] = streamed(client, messages[question], max_tokens=12)[0]

        threads = [threading.Thread(target=ask, args=[question]) for question in questions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    assert "Paris" in got[questions[0]]
    assert got == {q: expected(opened, messages[q], max_new_tokens=12)["text"] for q in questions}
