"""Tuning the whole model: the loss and its gradient, what is learned, and that a continued run is the same run."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from torch import nn

from ptq161 import distill
from ptq161.binarize import reconstruct
from ptq161.blocks import float32_vectors
from ptq161.config import QuantConfig
from ptq161.discovery import decoder_blocks
from ptq161.distill import (
    ROWS_AT_ONCE,
    curve,
    divergence,
    held_out_count,
    held_out_divergence,
    predictions,
    step_count,
    tune,
)
from ptq161.errors import NonFiniteError
from ptq161.latent import LatentWeight
from ptq161.mixed import group_columns, mixed_weight
from ptq161.student import memory_bytes, student_of

CONFIG = QuantConfig(
    method="mixed",
    distill_tokens=10**6,
    distill_passes=2,
    distill_batch_size=2,
    distill_lr_latent=2e-2,
    distill_lr_scale=5e-3,
)
SAMPLES = torch.randint(4, VOCABULARY, (11, 10), generator=torch.Generator().manual_seed(0))


def tiny(family="llama"):
    return build(FAMILIES[family]()).requires_grad_(False)


def latents_of(model):
    """Every linear of the blocks at mixed widths, latents at the original weight."""
    prefix, _ = decoder_blocks(model)
    latents = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefix):
            cols = module.in_features
            widths = [("1bit", cols // 4), ("ternary", cols - cols // 4 - cols // 8), ("4bit", cols // 8)]
            weight = module.weight.detach()
            columns = group_columns(weight.float().square().sum(0), widths)
            latents[name] = LatentWeight.of(weight, mixed_weight(weight, columns, widths, torch.ones(cols)))
    return latents


def run(model, samples=SAMPLES, config=CONFIG, state=None, on_step=lambda *step: None, save=lambda state: None):
    """(record, student) of a whole run from the model's own latents."""
    student = student_of(model, latents_of(model), torch.bfloat16)
    few = held_out_count(len(samples))
    return tune(model, student, samples[:few], samples[few:], config, state, on_step, save), student


def leaves(student):
    return {name: leaf.detach().clone() for name, leaf in student.leaves().items()}


def differs(model, student, tokens):
    """The loss of a step on tokens."""
    return divergence(model, student, tokens, predictions(model, tokens, student.dtype))


# The loss


def test_divergence_and_its_gradient_are_those_of_torch():
    draws = torch.Generator().manual_seed(1)
    rows = 2 * ROWS_AT_ONCE + 7
    wanted = 3 * torch.randn(rows, 50, generator=draws)
    actual = (3 * torch.randn(rows, 50, generator=draws)).requires_grad_()
    found = distill._Divergence.apply(actual, wanted)
    (gradient,) = torch.autograd.grad(5 * found, actual)

    logs = actual.log_softmax(-1), wanted.log_softmax(-1)
    expected = nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    (wanted_gradient,) = torch.autograd.grad(5 * expected, actual)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)


def test_divergence_of_equal_logits_is_nothing():
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = distill._Divergence.apply(logits, logits.detach())
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-7


def test_divergence_is_a_mean_over_tokens():
    model = tiny()
    student = student_of(model, latents_of(model), torch.bfloat16)
    whole = differs(model, student, SAMPLES[:3]).item()
    assert whole == pytest.approx(sum(differs(model, student, s[None]).item() for s in SAMPLES[:3]) / 3, rel=0.02)
    assert whole > 0.05


# The student


def test_student_is_what_a_file_would_hold():
    model = tiny()
    student = student_of(model, latents_of(model), torch.bfloat16)
    weights = replace(student, dtype=torch.float32).weights()
    for name, latent in student.latents.items():
        assert weights[f"{name}.weight"].equal(reconstruct(latent.quantized()))
    assert weights.keys() == {f"{name}.weight" for name in student.latents} | student.norms.keys()


@pytest.mark.parametrize("family", ["llama", "opt", "falcon-alibi"])
def test_student_of_an_original_that_is_representable_does_not_differ(family):
    """Weights at exact levels: rounding changes nothing, so the predictions are the same to the last bit."""
    model = tiny(family)
    latents = latents_of(model)
    for name, latent in latents.items():
        model.get_submodule(name).weight.copy_(latent.dense(torch.float32).detach())
    student = student_of(model, latents, torch.bfloat16)
    assert differs(model, student, SAMPLES[:2]).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        next(iter(student.norms.values())).mul_(1.5)
    assert differs(model, student, SAMPLES[:2]).item() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_found_and_nothing_else(family):
    model = tiny(family)
    student = student_of(model, latents_of(model), torch.bfloat16)
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Norm", "RMSNorm"))
    }
    assert student.norms.keys() == expected and expected
    for name, norm in student.norms.items():
        assert norm.is_leaf and norm.requires_grad and norm.dtype == torch.float32
        assert norm.equal(model.get_parameter(name)) and norm is not model.get_parameter(name)


@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_every_family_learns(family, dtype, products):
    model = tiny(family)
    _, blocks = decoder_blocks(model)
    blocks.to(dtype)
    with float32_vectors(model):
        student = student_of(model, latents_of(model), products)
        differs(model, student, SAMPLES[:2]).backward()
    for name, leaf in student.leaves().items():
        assert leaf.grad is not None and leaf.grad.isfinite().all(), name
    assert all(norm.grad.abs().max() > 0 for norm in student.norms.values())
    assert all(latent.latent.grad.abs().max() > 0 for latent in student.latents.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_computed_again_change_nothing(family):
    """Not one bit of loss or gradient, and the model is whole afterwards."""
    model = tiny(family)
    prefix, blocks = decoder_blocks(model)
    modules = dict(model.named_modules())
    names = tuple(f"{prefix}.{index}" for index in range(len(blocks)))
    found = []
    for recomputed in ((), names):
        student = student_of(model, latents_of(model), torch.bfloat16, recomputed)
        loss = differs(model, student, SAMPLES[:2])
        loss.backward()
        found.append([loss, *(leaf.grad for leaf in student.leaves().values())])
    assert all(kept.equal(again) for kept, again in zip(*found, strict=True))
    assert dict(model.named_modules()) == modules


def test_blocks_computed_again_keep_less():
    """What the backward pass holds on to, in bytes."""
    model = tiny()
    held = []
    for recomputed in ((), ("model.layers.0", "model.layers.1")):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.untyped_storage().nbytes()
            return tensor

        student = student_of(model, latents_of(model), torch.bfloat16, recomputed)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            differs(model, student, SAMPLES[:2])
        held.append(kept)
    assert held[1] < 0.5 * held[0]


# The run


def test_held_out_divergence_falls():
    """On one text, from which held-out samples and learned ones are cut alike."""
    model = tiny()
    text = torch.randint(4, 20, (40, 12), generator=torch.Generator().manual_seed(0))
    record, student = run(model, text)
    assert record["kept"] and record["held_out_last"] < 0.8 * record["held_out_first"]
    held_out = text[: held_out_count(40)]
    assert record["held_out_last"] == held_out_divergence(model, student, held_out)
    start = student_of(model, latents_of(model), torch.bfloat16)
    assert record["held_out_first"] == held_out_divergence(model, start, held_out)


def test_record_and_progress_count_what_was_done():
    seen = []
    record, _ = run(tiny(), on_step=lambda *step: seen.append(step))
    # Eleven samples, one held out; ten in steps of two, twice.
    assert record.keys() == {"steps", "tokens", "distinct_tokens", "held_out_first", "held_out_last", "curve", "kept"}
    assert (record["steps"], record["tokens"], record["distinct_tokens"]) == (10, 200, 100)
    assert [(step, of) for step, of, _ in seen] == [(step, 10) for step in range(1, 11)]
    assert all(loss > 0 for _, _, loss in seen)
    assert record["curve"] == [{"tokens": 20 * step, "divergence": loss} for step, _, loss in seen]


@pytest.mark.parametrize(("steps", "points"), [(0, 0), (1, 1), (100, 100), (101, 51), (250, 84), (1000, 100)])
def test_curve_has_the_mean_of_equal_stretches(steps, points):
    losses = [float(step) for step in range(steps)]
    found = curve(losses, 7)
    assert len(found) == points
    begun = 0
    for point in found:
        end = point["tokens"] // 7
        assert point["divergence"] == pytest.approx(sum(losses[begun:end]) / (end - begun))
        begun = end
    assert begun == steps


def test_original_is_left_as_it_was():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_held_out_samples_are_not_learned_from():
    """Whatever the held-out sample is, the same is learned."""
    model = tiny()
    other = SAMPLES.clone()
    other[0] = other[0].flip(0)
    config = replace(CONFIG, distill_passes=1)
    (one, first), (two, second) = run(model, config=config), run(model, other, config)
    assert one["held_out_first"] != two["held_out_first"]
    assert all(tensor.equal(leaves(second)[name]) for name, tensor in leaves(first).items())


def test_run_that_makes_it_worse_is_not_kept():
    config = replace(CONFIG, distill_lr_latent=0.0, distill_lr_scale=0.5, distill_passes=1)
    record, _ = run(tiny(), config=config)
    assert record["held_out_last"] > record["held_out_first"] and record["kept"] is False


def test_each_rate_moves_its_own_leaves():
    model = tiny()
    start = leaves(student_of(model, latents_of(model), torch.bfloat16))
    for rates, kinds in (((1e-2, 0.0), {"latent"}), ((0.0, 1e-3), {"gain", "weight"}), ((0.0, 0.0), set())):
        config = replace(CONFIG, distill_tokens=60, distill_lr_latent=rates[0], distill_lr_scale=rates[1])
        _, student = run(model, config=config)
        moved = {name for name, leaf in leaves(student).items() if not leaf.equal(start[name])}
        assert {name.rpartition(".")[2] for name in moved} == kinds


def test_repeated_passes_redraw_what_is_learned():
    """Which changes the result from the second pass on, and is settable."""
    model = tiny()
    found = {}
    for passes in (1, 2):
        for share in (0.0, 0.5):
            _, student = run(model, config=replace(CONFIG, distill_passes=passes, distill_redraw=share))
            found[passes, share] = leaves(student)
    assert all(leaf.equal(found[1, 0.5][name]) for name, leaf in found[1, 0.0].items())
    assert not all(leaf.equal(found[2, 0.5][name]) for name, leaf in found[2, 0.0].items())


# Continued


class Interruption(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def uninterrupted():
    """(record, leaves) of a run of ten steps."""
    record, student = run(tiny())
    assert record["steps"] == 10
    return record, leaves(student)


@pytest.mark.parametrize("done", [1, 6, 10])
def test_continued_run_gives_the_same_leaves_to_the_last_bit(done, uninterrupted, monkeypatch):
    monkeypatch.setattr(distill, "SECONDS_BETWEEN_SAVES", 0.0)
    model = tiny()
    kept = {}

    def save(state):
        kept.clear()
        kept.update({name: tensor.clone() for name, tensor in state.items()})
        if int(state["step"]) == done:
            raise Interruption

    with pytest.raises(Interruption):
        run(model, save=save)
    assert all(isinstance(tensor, torch.Tensor) for tensor in kept.values())
    seen = []
    record, student = run(model, state=kept, on_step=lambda step, *_: seen.append(step))
    assert seen == list(range(done + 1, 11)), "a finished step was done again"
    expected, whole = uninterrupted
    assert record == expected
    again = leaves(student)
    assert all(again[name].equal(whole[name]) for name in whole)


def test_state_is_saved_now_and_then_and_at_the_end(monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(distill.time, "monotonic", lambda: float(next(clock)))
    saved = []
    run(tiny(), save=lambda state: saved.append(int(state["step"])))
    assert saved[-1] == 10
    assert 2 < len(saved) < 6  # the clock goes on by 100 s at every look, and 300 s lie between two


# Refusals


@pytest.mark.parametrize(
    ("samples", "changes", "steps"),
    [
        (10, {}, 10),
        (11, {}, 10),  # a sample that fills no batch is left out of a pass
        (10, {"distill_batch_size": 3}, 6),
        (10, {"distill_passes": 1}, 5),
        (10, {"distill_tokens": 199}, 9),  # 20 tokens a step
        (10, {"distill_tokens": 20}, 1),
    ],
)
def test_steps_stay_within_tokens_and_passes(samples, changes, steps):
    assert step_count(samples, 10, replace(CONFIG, **changes)) == steps


@pytest.mark.parametrize(
    ("samples", "changes"), [(0, {}), (1, {}), (10, {"distill_tokens": 19}), (10, {"distill_batch_size": 11})]
)
def test_too_little_for_a_single_step_is_none(samples, changes):
    assert step_count(samples, 10, replace(CONFIG, **changes)) == 0


def test_a_tenth_is_held_out():
    counts = {0: 0, 1: 1, 2: 1, 19: 1, 20: 2, 79: 7, 85: 8, 5000: 8}
    assert {samples: held_out_count(samples) for samples in counts} == counts


def test_divergence_that_is_not_finite_names_the_step():
    with pytest.raises(NonFiniteError, match=r"diverged at step \d+ of 10; lower distill_lr_latent") as error:
        run(tiny(), config=replace(CONFIG, distill_lr_scale=1e30))
    assert "distill=off" in str(error.value) and "\n" not in str(error.value)


def test_memory_grows_with_weights_and_tokens():
    model = tiny()
    needed = memory_bytes(model, 1000, 10, CONFIG, torch.bfloat16)
    assert memory_bytes(model, 2000, 10, CONFIG, torch.bfloat16) - needed == 20 * 1000
    assert memory_bytes(model, 1000, 20, CONFIG, torch.bfloat16) - needed == memory_bytes(
        model, 0, 10, CONFIG, torch.bfloat16
    )
    assert memory_bytes(model, 0, 10, replace(CONFIG, distill_batch_size=4), torch.bfloat16) == 2 * memory_bytes(
        model, 0, 10, CONFIG, torch.bfloat16
    )
    assert memory_bytes(model, 1000, 10, CONFIG, torch.bfloat16, recomputed=True) < 0.9 * needed
    assert memory_bytes(model, 1000, 10, CONFIG, torch.float32) > 1.1 * needed
    per_token = memory_bytes(model, 0, 10, CONFIG, torch.bfloat16) / 20
    assert per_token >= 3 * 4 * VOCABULARY and math.isfinite(per_token)
