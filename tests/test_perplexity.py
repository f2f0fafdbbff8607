import math

import pytest
import torch
from families import FAMILIES, build

from ptq161.data import evaluation_tokens
from ptq161.errors import InputError, NonFiniteError
from ptq161.evaluate.perplexity import perplexity
from ptq161.sources import open_model


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"]())


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(96, (107,), generator=torch.Generator().manual_seed(3))


def naive_nll(model, window, bos):
    """Sum over the window's tokens but the first of -log p(token | all before it), one prefix at a time."""
    total = 0.0
    prefix = [] if bos is None else [bos]
    with torch.no_grad():
        for length in range(1, len(window)):
            logits = model(torch.tensor([[*prefix, *window[:length]]])).logits[0, -1].double()
            total -= float(logits.log_softmax(dim=-1)[window[length]])
    return total


@pytest.mark.parametrize("bos", [None, 0])
def test_it_is_what_the_definition_says(model, tokens, bos):
    windows = [tokens[start : start + 25].tolist() for start in (0, 25, 50, 75)]  # the tail of 7 is dropped
    expected = math.exp(sum(naive_nll(model, window, bos) for window in windows) / (4 * 24))
    result = perplexity(model, tokens, 25, bos=bos)
    assert result == {"ppl": pytest.approx(expected, rel=1e-5), "tokens": 96, "windows": 4, "seqlen": 25, "bos": bos}


def test_bos_changes_the_context_and_not_what_is_predicted(model, tokens):
    assert perplexity(model, tokens, 25)["ppl"] != pytest.approx(perplexity(model, tokens, 25, bos=0)["ppl"], rel=1e-3)


def test_it_agrees_with_the_loss_of_transformers(model, tokens):
    windows = tokens[:100].view(4, 25)
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss for window in windows]
    assert perplexity(model, tokens, 25)["ppl"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_long_windows_are_summed_in_pieces_without_losing_a_token(model):
    tokens = torch.randint(96, (600,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = float(model(tokens[None], labels=tokens[None]).loss.exp())
    assert perplexity(model, tokens, 600)["ppl"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_knows_nothing_scores_its_vocabulary(tokens):
    model = build(FAMILIES["llama"]())
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tokens, 20)["ppl"] == pytest.approx(96)


def test_max_windows_stops_early_and_progress_is_told(model, tokens):
    seen = []
    result = perplexity(model, tokens, 10, max_windows=3, on_window=lambda done, windows: seen.append((done, windows)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result["windows"] == 3 and result["tokens"] == 27
    assert result["ppl"] == perplexity(model, tokens[:30], 10)["ppl"]
    assert perplexity(model, tokens, 10, max_windows=99)["windows"] == 10


def test_dropout_is_off_and_the_mode_is_left_as_found(tokens):
    config = FAMILIES["opt"]()
    config.dropout = 0.5
    model = build(config)
    quiet = perplexity(model, tokens, 20)["ppl"]
    model.train()
    assert perplexity(model, tokens, 20)["ppl"] == quiet
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlen": 108}, "the text has 107 tokens, less than one window of 108"),
        ({"seqlen": 1}, "seqlen=1 is out of range"),
        ({"seqlen": 10, "max_windows": 0}, "max_windows=0 is out of range"),
    ],
)
def test_bad_arguments_are_refused(model, tokens, arguments, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, tokens, **arguments)


def test_foreign_tokens_are_refused(model, tokens):
    with pytest.raises(InputError, match="token id 96 is beyond the model's vocabulary of 96"):
        perplexity(model, tokens.index_fill(0, torch.tensor([50]), 96), 20)


def test_more_tokens_than_positions_are_refused():
    tokens = torch.zeros(200, dtype=torch.int64)
    with pytest.raises(InputError, match="129 tokens at once"):
        perplexity(build(FAMILIES["opt"]()), tokens, 129)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_result_that_is_not_finite_is_an_error(tokens, value):
    model = build(FAMILIES["llama"]())
    model.lm_head.weight.data[5] = value
    with pytest.raises(NonFiniteError, match="not finite"):
        perplexity(model, tokens, 20)


def test_a_trained_model_scores_its_own_kind_of_text(stories_folder):
    model, tokenizer = open_model(stories_folder)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, "
    tokens = torch.tensor(tokenizer(story * 3, add_special_tokens=False)["input_ids"])
    seqlen = len(tokens) // 3
    assert perplexity(model, tokens, seqlen)["ppl"] < 10
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled, seqlen)["ppl"] > 100


@pytest.mark.model
def test_smollm2_on_wikitext2_is_where_the_literature_has_it(smollm2_gguf, shared_data):
    model, tokenizer = open_model(smollm2_gguf)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    tokens = evaluation_tokens(str(shared_data / "text" / "wikitext2_test.raw"), tokenizer)
    assert len(tokens) // 512 == 592
    result = perplexity(model, tokens, 512, max_windows=4)
    assert result["ppl"] == pytest.approx(29.98, abs=0.02)
