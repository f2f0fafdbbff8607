"""What a config.json may ask transformers for, and how what libraries raise becomes one line."""

import pytest

from ptq161.errors import MAX_MESSAGE, CheckpointError, InputError, one_line
from ptq161.foreign import MAX_COUNT, complaints, config_problem


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": MAX_COUNT + 1},
        {"num_labels": 10**9},
        {"n_layer": 10**9},
        {"hidden_size": 2**40},
        {"vocab_size": -(2**62)},
        {"text_config": {"parts": [{"num_layers": 10**6}]}},
        {"return_dict": False},
        {"_attn_implementation": "stranger/kernel"},
        {"attn_implementation": {"": "stranger/kernel"}},
        {"text_config": {"experts_implementation": "stranger/kernel"}},
    ],
)
def test_absurd_sizes_and_kernels_from_elsewhere_are_refused(config):
    assert config_problem(config) is not None


def test_honest_configurations_pass():
    nested = {"a": None}
    for _ in range(5000):
        nested = {"a": nested}
    honest = {"num_hidden_layers": 126, "max_position_embeddings": 10**7, "attn_implementation": "sdpa", "x": True}
    assert config_problem(honest | nested | {"id2label": {0: "no", 1: "yes"}}) is None


@pytest.mark.parametrize("raised", [Exception("bare"), RecursionError(), AssertionError("a\nb"), KeyError("k")])
def test_whatever_a_library_raises_becomes_one_line(raised):
    with pytest.raises(CheckpointError, match=r"^file: ") as error, complaints("file", CheckpointError):
        raise raised
    assert str(error.value).isprintable() and error.value.__cause__ is raised


def test_our_own_errors_and_interruptions_pass():
    for ours in (InputError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(ours)) as error, complaints("file"):
            raise ours
        assert error.value is ours


def test_messages_are_one_printable_line_of_limited_length():
    assert one_line("a\n b\x1b[2J") == "a b\\x1b[2J"
    long = str(InputError("begin " + "x" * 10**6 + " end"))
    assert long.startswith("begin") and long.endswith(" end") and len(long) < MAX_MESSAGE + 10
