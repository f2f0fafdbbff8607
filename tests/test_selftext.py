import pytest
import torch
from families import FAMILIES, VOCABULARY, build

from ptq161 import selftext
from ptq161.draws import tokens_at
from ptq161.errors import NonFiniteError
from ptq161.selftext import continuations, sample_from_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"]())


@pytest.mark.parametrize("bos", [0, None])
def test_samples_depend_on_the_seed_alone(model, bos):
    samples = sample_from_model(model, bos, 20, 9, generator())
    assert samples.shape == (20, 9) and samples.dtype == torch.int64
    assert samples.min() >= 0 and samples.max() < VOCABULARY
    assert len(samples.unique(dim=0)) == 20
    torch.manual_seed(7)
    assert torch.equal(samples, sample_from_model(model, bos, 20, 9, generator()))
    assert not torch.equal(samples, sample_from_model(model, bos, 20, 9, generator(1)))


def test_first_tokens_follow_the_models_own_distribution(model):
    drawn = sample_from_model(model, 0, 800, 1, generator()).flatten()
    with torch.no_grad():
        expected = model(torch.tensor([[0]])).logits[0, -1].softmax(dim=-1)
    measured = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert (measured - expected).abs().sum() / 2 < 0.15  # total variation; 0.5 or more for any other distribution
    uniform = torch.full_like(expected, 1 / VOCABULARY)
    assert (uniform - expected).abs().sum() / 2 > 0.3


def test_each_token_is_drawn_after_all_earlier_ones(model):
    """Drawing with the cache gives what drawing from whole prefixes gives."""
    samples = sample_from_model(model, 0, 3, 6, generator())
    prefix, same_draws = torch.zeros(3, 1, dtype=torch.int64), generator()
    with torch.no_grad():
        for _ in range(6):
            probabilities = model(prefix).logits[:, -1].softmax(dim=-1)
            following = tokens_at(torch.rand(3, generator=same_draws), probabilities)
            prefix = torch.cat([prefix, following[:, None]], dim=1)
    assert torch.equal(samples, prefix[:, 1:])


def test_a_model_with_nan_logits_cannot_write(model):
    broken = build(FAMILIES["llama"]())
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite logits"):
        sample_from_model(broken, 0, 2, 4, generator())


def test_more_of_a_text_begins_with_pieces_from_anywhere_in_it(model):
    text = torch.arange(4, 4 + 3 * 16).view(3, 16) % VOCABULARY
    more = continuations(model, text, 40, generator())
    assert more.shape == (40, 16)
    pieces = {tuple(row[i : i + 2]) for row in text.tolist() for i in range(15)}
    begun = {tuple(row[:2]) for row in more.tolist()}
    assert begun <= pieces and len(begun) > 15
    assert more.equal(continuations(model, text, 40, generator())) and len(more[:, 2:].unique(dim=0)) == 40


def test_more_of_a_text_is_drawn_after_all_that_stands_before(model):
    """A piece that settles nothing but the first draw: the same draws from whole prefixes give the same text."""
    text = torch.full((1, 8), 7)
    drawn, same_draws = continuations(model, text, 3, generator()), generator()
    torch.randint(1, (3, 1), generator=same_draws), torch.randint(8, (3, 1), generator=same_draws)  # which piece
    prefix = torch.full((3, 1), 7)
    with torch.no_grad():
        for _ in range(7):
            probabilities = model(prefix).logits[:, -1].softmax(dim=-1)
            following = tokens_at(torch.rand(3, generator=same_draws), probabilities)
            prefix = torch.cat([prefix, following[:, None]], dim=1)
    assert drawn.equal(prefix)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes(family):
    text = torch.randint(4, VOCABULARY, (2, 16), generator=generator())
    assert continuations(build(FAMILIES[family]()), text, 3, generator()).shape == (3, 16)


def test_samples_at_once_fit_the_cache(model, monkeypatch):
    """Keys and values of 2 layers, 2 heads of width 8, 16 tokens, in float32."""
    seen = []
    monkeypatch.setattr(selftext, "_CACHE_BYTES", 5 * 16 * 2 * 2 * 2 * 8 * 4)
    text = torch.randint(4, VOCABULARY, (2, 16), generator=generator())
    assert len(continuations(model, text, 12, generator(), lambda *step: seen.append(step))) == 12
    assert seen == [(5, 12), (10, 12), (12, 12)]
