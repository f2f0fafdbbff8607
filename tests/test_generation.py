import warnings

import pytest
import torch
from families import FAMILIES, build

from ptq161.errors import InputError
from ptq161.generation import Sampling
from ptq161.generation import stream as stream_tokens
from ptq161.sources import open_model


def stream(model, tokenizer, prompt, on_text=lambda text: None, **sampling):
    return stream_tokens(model, tokenizer, tokenizer(prompt)["input_ids"], Sampling(**sampling), on_text=on_text)


@pytest.fixture(scope="module")
def model():
    model = build(FAMILIES["llama"]())
    model.generation_config.eos_token_id = None  # random weights would stop anywhere
    return model


@pytest.fixture
def endless(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", unk_token="<unk>")
    assert tokenizer.eos_token_id is None
    return tokenizer


def test_text_arrives_in_pieces_that_add_up(model, endless):
    pieces = []
    result = stream(model, endless, "The river", max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces) == result["text"]
    assert all(pieces)
    assert result["tokens"] == 30
    assert 0 < result["first_token_seconds"] <= result["seconds"]
    assert result["tok_s"] > 0


def test_greedy_is_what_the_model_thinks_likeliest(model, endless):
    tokens = endless("The river")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    result = stream(model, endless, "The river", max_new_tokens=8)
    assert result["text"] == endless.decode(tokens[-8:], skip_special_tokens=True)


def test_sampling_follows_the_seed_and_leaves_the_global_generator_alone(model, endless):
    def sample(seed, **settings):
        return stream(model, endless, "The", max_new_tokens=20, temperature=1.0, seed=seed, **settings)["text"]

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert sample(1) == sample(1)
    assert torch.equal(torch.rand(3), expected)
    assert sample(1) != sample(2)
    greedy = stream(model, endless, "The", max_new_tokens=20)["text"]
    assert sample(1) != greedy
    assert sample(1, top_p=1e-6) == greedy


def test_it_stops_at_end_of_text(model, tokenizer, endless):
    first = stream(model, endless, "The river", max_new_tokens=12)
    model.generation_config.eos_token_id = endless.convert_tokens_to_ids(first["text"][0])
    try:
        stopped = stream(model, endless, "The river", max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = None
    assert stopped["tokens"] == 1
    assert stopped["tok_s"] is None


def test_nothing_is_printed_or_warned(model, endless, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(model, endless, "The", max_new_tokens=3)
        stream(model, endless, "The", max_new_tokens=3, temperature=0.7, top_p=0.9)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"top_p": 1.1}, "top_p=1.1 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(model, tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        stream(model, tokenizer, "The", **settings)


def test_an_empty_prompt_and_one_without_room_are_refused(model, tokenizer):
    with pytest.raises(InputError, match="the prompt is empty"):
        stream(model, tokenizer, "")
    with pytest.raises(InputError, match="has 128 positions"):
        stream(build(FAMILIES["opt"]()), tokenizer, "The", max_new_tokens=126)


def test_a_trained_model_tells_a_story(stories_folder):
    model, tokenizer = open_model(stories_folder)
    result = stream(model, tokenizer, "Once upon a time", max_new_tokens=24)
    assert result["text"].startswith(", there was a little girl named Lily.")
