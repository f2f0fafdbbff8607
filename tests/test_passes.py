"""Text that is learned from in passes: who is read when, and what is redrawn from what."""

import pytest
import torch

from ptq161 import ranks
from ptq161.passes import Passes

COUNT, LENGTH, SIZE, VOCABULARY = 7, 40, 2, 500
SAMPLES = torch.arange(COUNT * LENGTH).view(COUNT, LENGTH)
STEPS = COUNT // SIZE


def certain(tokens):
    """Logits that leave no doubt: after token t comes 400 + t % 100, which the samples do not have."""
    return torch.full((*tokens.shape, VOCABULARY), -1e4).scatter(-1, (400 + tokens % 100)[..., None], 0.0)


def read(passes, number, predicted=certain):
    """What a pass reads, in its order; all of it is redrawn."""
    batches = []
    for step in range(number * STEPS, (number + 1) * STEPS):
        batches.append(passes.batch(step))
        passes.redraw(step, predicted(batches[-1]))
    return torch.cat(batches)


def test_first_pass_reads_every_sample_as_it_is():
    found = read(Passes(SAMPLES, SIZE, 0.5, seed=0), 0)
    rows = {tuple(row) for row in found.tolist()}
    assert len(rows) == STEPS * SIZE and rows < {tuple(row) for row in SAMPLES.tolist()}


def test_later_passes_cut_elsewhere_but_keep_the_text():
    passes = Passes(SAMPLES, SIZE, 0.0, seed=0)
    first, second, third = (read(passes, number) for number in range(3))
    assert passes.text.equal(SAMPLES)
    for found in (second, third):
        assert found.unique().numel() == found.numel(), "a token was read twice in a pass"
        breaks = {tuple((row[1:] - row[:-1] != 1).nonzero()[:, 0].tolist()) for row in found}
        assert len(breaks) == 1 and len(next(iter(breaks))) == 1, "every window is the end of a sample and a beginning"
    assert not first.equal(second) and not second.equal(third)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_the_tokens_follows_the_prediction(share):
    """Each redrawn token is what was predicted from the token read before it; the others are the sample's."""
    samples = torch.randint(400, (50, 200), generator=torch.Generator().manual_seed(0))
    passes = Passes(samples, 2, share, seed=0)
    for step in range(25):
        passes.redraw(step, certain(passes.batch(step)))
    changed = passes.text != samples
    assert changed[:, 1:].float().mean().item() == pytest.approx(share, abs=0.02)
    assert not changed[:, 0].any(), "the first token of a window is predicted from nothing"
    assert passes.text[:, 1:][changed[:, 1:]].equal(400 + samples[:, :-1][changed[:, 1:]] % 100)


def test_redrawn_tokens_are_put_back_in_the_next_round():
    """The text does not drift away: what a pass redraws is drawn into the text as it was given."""
    samples = torch.randint(400, (60, 100), generator=torch.Generator().manual_seed(0))
    passes = Passes(samples, 2, 0.2, seed=0)
    for step in range(8 * 30):
        passes.redraw(step, certain(passes.batch(step)))
    assert (passes.text != samples).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_draws_follow_the_distribution():
    samples = torch.zeros(200, 101, dtype=torch.int64)
    chances = torch.tensor([0.0, 0.6, 0.3, 0.1])
    passes = Passes(samples, 2, 1.0, seed=0)
    for step in range(100):
        passes.redraw(step, chances.log().expand(2, 101, 4))
    drawn = passes.text[:, 1:].flatten()
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(drawn), chances, rtol=0, atol=0.02)


def test_seed_decides():
    def both(seed):
        passes = Passes(SAMPLES, SIZE, 0.5, seed)
        return torch.cat([read(passes, 0), read(passes, 1)])

    assert both(0).equal(both(0))
    assert not both(0).equal(both(1))


def test_ranks_together_redraw_what_one_would(monkeypatch):
    """Each rank draws its own rows; their sum is what a process alone draws."""
    alone = Passes(SAMPLES, SIZE, 0.5, seed=0)
    wanted = read(alone, 0)
    parts = []
    monkeypatch.setattr(ranks, "add", lambda tensor: parts.append(tensor.clone()))
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        passes = Passes(SAMPLES, SIZE, 0.5, seed=0)
        for step in range(STEPS):
            passes.redraw(step, certain(passes.batch(step)[number::2]))
    first, second = torch.cat(parts[:STEPS]), torch.cat(parts[STEPS:])
    assert not ((first != 0) & (second != 0)).any()
    places = torch.cat([alone._places(step) for step in range(STEPS)])
    assert (first + second).equal(alone.text.flatten()[places]) and not wanted.equal(first + second)


@pytest.mark.parametrize(("step", "steps", "expected"), [(0, 3, False), (0, 4, True), (2, 4, True), (3, 6, False)])
def test_last_pass_is_not_made_ready_for_another(step, steps, expected):
    assert Passes(SAMPLES, SIZE, 0.5, seed=0).read_again(step, steps) is expected
