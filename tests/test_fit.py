"""Block-wise learning: the distance by hand, and that a few steps do what they should to a tiny block."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCABULARY, build

from ptq161.binarize import QuantizedWeight, quantize_weight, reconstruct, salient_count
from ptq161.blocks import BlockTask, advance, watch_inputs
from ptq161.config import Compute, Magnitude, QuantConfig
from ptq161.discovery import block_linears, decoder_blocks, first_hidden, trace
from ptq161.errors import NonFiniteError
from ptq161.fit import (
    LAST_RATE,
    SMALLEST_COSINE,
    block_distance,
    fit_block,
    fit_latents,
    latent_parameters,
    measure,
    objective,
    weight_arguments,
)
from ptq161.latent import LatentWeight
from ptq161.methods.ptq161 import block_masks
from ptq161.mixed import group_columns, mixed_weight

CPU = torch.device("cpu")
CONFIG = QuantConfig(
    row_mean=True,
    magnitude=Magnitude.MSE,
    angular=True,
    epochs=3,
    batch_size=1,
    lr_scale=2e-3,
    lr_angular=4e-3,
    compute=Compute.FLOAT32,
)


def paper_widths(cols, ratio):
    """The paper's column groups at a salient ratio: those that are not empty."""
    salient = salient_count(ratio, cols)
    return tuple((name, count) for name, count in (("1bit", cols - salient), ("4bit", salient)) if count)


def block_task(family="llama", samples=4, seq=12):
    """The first block of a tiny model, with a quantized stream that differs a little from the full one."""
    generator = torch.Generator().manual_seed(0)
    model = build(FAMILIES[family]()).requires_grad_(False)
    _, blocks = decoder_blocks(model)
    tokens = torch.randint(4, VOCABULARY, (samples, seq), generator=generator)
    traced = trace(model, blocks, tokens)
    hidden = first_hidden(model, blocks, tokens)
    drifted = hidden + 0.05 * torch.randn(hidden.shape, generator=generator)
    linears = block_linears(model, 0, blocks[0])
    with watch_inputs(linears) as stats:
        full_out = advance(blocks[0], traced.calls[0], hidden, CPU)
    return BlockTask(
        index=0,
        block=blocks[0],
        linears=linears,
        columns_from=traced.columns_from[0],
        full_in=hidden,
        quantized_in=drifted,
        full_out=full_out,
        local_out=advance(blocks[0], traced.calls[0], drifted, CPU),
        call=traced.calls[0],
        stats=stats,
        widths={name: paper_widths(linear.in_features, 0.2) for name, linear in linears.items()},
    )


def initial_weights(task, config=CONFIG):
    masks = block_masks(task, config.statistic)
    return {
        name: quantize_weight(linear.weight, masks[name], salient_range=config.salient_range, row_mean=config.row_mean)
        for name, linear in task.linears.items()
    }


def fit(task, config=CONFIG, seed=0, **more):
    return fit_block(task, initial_weights(task, config), config, torch.Generator().manual_seed(seed), **more)


def factors(weights):
    """Every factor of a block's binarized groups, flat: linear.name -> tensor."""
    return {
        f"{linear}.{name}": getattr(group, name)
        for linear, weight in weights.items()
        for group in weight.groups
        if group.row is not None
        for name in ("scale", "row", "col")
    }


# The distance

ACTUAL = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
WANTED = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])  # cosines 0 and 1; errors (1, -1) and (0, 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"magnitude": Magnitude.MSE, "angular": False}, 6 / 4),
        ({"magnitude": Magnitude.L2, "angular": False}, (math.sqrt(2) + 2) / 2),
        ({"magnitude": Magnitude.RELATIVE, "angular": False}, (2 / 1 + 4 / 1) / 2),
        ({"magnitude": Magnitude.MSE, "angular": True}, 6 / 4 + math.log(2)),
        ({"magnitude": Magnitude.L2, "angular": True}, (math.sqrt(2) + 2) / 2 + math.log(2)),
    ],
)
def test_distance_by_hand(settings, expected):
    assert block_distance(ACTUAL, WANTED, replace(CONFIG, **settings)).item() == pytest.approx(expected, rel=1e-6)


def test_angular_term_ignores_length():
    config = CONFIG
    assert block_distance(WANTED, WANTED, config).item() == pytest.approx(0, abs=1e-6)
    longer = block_distance(2 * WANTED, WANTED, config) - (WANTED.square().mean())
    assert longer.item() == pytest.approx(0, abs=1e-6)


def test_opposite_directions_stay_finite():
    """A cosine below zero has no logarithm; the distance is then large but finite, and so is its gradient."""
    actual = (-WANTED).requires_grad_()
    distance = block_distance(actual, WANTED, CONFIG)
    distance.backward()
    assert distance.item() == pytest.approx((2 * WANTED).square().mean().item() - math.log(SMALLEST_COSINE))
    assert actual.grad.isfinite().all()


def test_relative_error_is_the_same_at_every_size_and_finite_at_none():
    config = replace(CONFIG, magnitude=Magnitude.RELATIVE, angular=False)
    wanted = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    actual = 1.1 * wanted
    assert block_distance(actual, wanted, config).item() == pytest.approx(0.01, rel=1e-4)
    sizes = torch.tensor([1e-1, 1.0, 1e3, 1e4, 10.0, 1e2])[None, :, None]
    assert block_distance(actual * sizes, wanted * sizes, config).item() == pytest.approx(0.01, rel=1e-3)
    assert block_distance(actual, torch.zeros_like(wanted), config).isfinite()


def test_objective_is_the_sum_of_both_branches():
    local = torch.tensor([[[1.0, 1.0], [2.0, -1.0]]])
    config = CONFIG
    branches = block_distance(ACTUAL, WANTED, config) + block_distance(ACTUAL, local, config)
    assert objective(ACTUAL, WANTED, local, config).item() == pytest.approx(branches.item())


# Measuring


def test_measured_loss_is_the_mean_over_samples_and_output_the_quantized_blocks():
    task = block_task()
    weights = initial_weights(task)
    loss, outputs = measure(task, weights, CONFIG)
    dense = weight_arguments({name: reconstruct(weight) for name, weight in weights.items()})
    for entered, left in zip(task.quantized_in, outputs, strict=True):
        assert left.equal(task.call(task.block, entered[None], dense)[0])
    each = [
        objective(outputs[i : i + 1], task.full_out[i : i + 1], task.local_out[i : i + 1], CONFIG) for i in range(4)
    ]
    assert loss == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)


# Learning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"angular": False},
        {"magnitude": Magnitude.L2},
        {"row_mean": False},
        {"batch_size": 3},
        {"compute": Compute.BFLOAT16},
    ],
    ids=str,
)
def test_a_few_steps_lower_the_objective(changes):
    task = block_task()
    config = replace(CONFIG, **changes)
    before, _ = measure(task, initial_weights(task, config), config)
    after, _ = measure(task, fit(task, config), config)
    assert after < 0.97 * before


@pytest.mark.parametrize("family", ["opt", "phi3", "gpt-neox", "falcon"])
def test_other_kinds_of_blocks_learn_too(family):
    task = block_task(family)
    before, _ = measure(task, initial_weights(task), CONFIG)
    after, _ = measure(task, fit(task), CONFIG)
    assert after < 0.99 * before


def test_only_scales_and_angular_factors_are_learned():
    task = block_task()
    before = initial_weights(task)
    after = fit(task)
    assert list(after) == list(before)
    for name in before:
        (binary, salient), (learned, kept) = before[name].groups, after[name].groups
        assert learned.codes.equal(binary.codes)
        assert learned.codes.dtype == torch.int8
        assert learned.mean.equal(binary.mean)
        assert all(getattr(kept, part).equal(getattr(salient, part)) for part in ("codes", "scale", "zero", "columns"))
    start, end = factors(before), factors(after)
    assert all(not end[name].equal(start[name]) for name in start)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in end.values())


@pytest.mark.parametrize(
    ("rates", "moved"), [((1e-3, 0.0), {"scale"}), ((0.0, 1e-3), {"row", "col"}), ((0.0, 0.0), set())]
)
def test_each_learning_rate_moves_its_own_factors(rates, moved):
    task = block_task()
    start = factors(initial_weights(task))
    end = factors(fit(task, replace(CONFIG, lr_scale=rates[0], lr_angular=rates[1])))
    assert {name.rpartition(".")[2] for name in start if not end[name].equal(start[name])} == moved


def test_no_epochs_keep_the_start():
    task = block_task()
    start, end = factors(initial_weights(task)), factors(fit(task, replace(CONFIG, epochs=0)))
    assert all(end[name].equal(start[name]) for name in start)


def test_the_block_is_left_as_it_was():
    task = block_task()
    before = {name: tensor.clone() for name, tensor in task.block.state_dict().items()}
    fit(task)
    assert all(tensor.equal(before[name]) for name, tensor in task.block.state_dict().items())
    assert all(parameter.grad is None for parameter in task.block.parameters())


def test_same_seed_same_factors_other_seed_others():
    task = block_task()
    one, again, other = factors(fit(task)), factors(fit(task)), factors(fit(task, seed=1))
    assert all(one[name].equal(again[name]) for name in one)
    assert any(not one[name].equal(other[name]) for name in one)


def test_one_batch_of_all_samples_does_not_depend_on_their_order():
    task = block_task()
    config = replace(CONFIG, batch_size=4, epochs=2)
    one, other = factors(fit(task, config)), factors(fit(task, config, seed=1))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 12), (3, 6), (4, 3), (100, 3)])
def test_progress_counts_every_step(batch_size, steps):
    seen = []
    fit(block_task(), replace(CONFIG, batch_size=batch_size), on_step=lambda *step: seen.append(step))
    assert [(step, of) for step, of, _ in seen] == [(step, steps) for step in range(1, steps + 1)]
    assert all(loss > 0 for _, _, loss in seen)


def test_loss_that_is_not_finite_names_block_and_epoch():
    task = replace(block_task(), index=7)
    task.quantized_in[2, 5, 3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"block 7, epoch 0, step .*activations, not of any factor"):
        fit(task)


def test_factor_that_is_not_finite_is_named():
    task = block_task()
    weights = initial_weights(task)
    binary, salient = weights["mlp.up_proj"].groups
    broken = replace(binary, scale=torch.full_like(binary.scale, float("nan")))
    weights["mlp.up_proj"] = QuantizedWeight((broken, salient))
    with pytest.raises(NonFiniteError, match=r"block 0, epoch 0, step 0, from the factors of mlp\.up_proj"):
        fit_block(task, weights, CONFIG, torch.Generator())


def test_diverging_learning_rate_is_caught_not_stored():
    task = block_task()
    with pytest.raises(NonFiniteError, match=r"lower the learning rates \(--set lr_scale"):
        fit(task, replace(CONFIG, lr_scale=1e30, lr_angular=1e30, epochs=5))


# Learning codes as well

MIXED = replace(
    CONFIG, method="mixed", magnitude=Magnitude.RELATIVE, angular=False, lr_latent=2e-2, lr_scale=5e-3, epochs=4
)


def latents_of(task):
    """Latent weights with a quarter of the channels at 1 bit, an eighth at 4 bits."""
    latents = {}
    for name, linear in task.linears.items():
        cols = linear.in_features
        widths = (("1bit", cols // 4), ("ternary", cols - cols // 4 - cols // 8), ("4bit", cols // 8))
        squares = task.stats[name].square_sum
        columns = group_columns(squares, widths)
        latents[name] = LatentWeight.of(linear.weight, mixed_weight(linear.weight.detach(), columns, widths, squares))
    return latents


def learned(task, config=MIXED, seed=0, **more):
    latents = latents_of(task)
    fit_latents(task, latents, config, torch.Generator().manual_seed(seed), **more)
    return latents


def quantized(latents):
    return {name: latent.quantized() for name, latent in latents.items()}


@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
@pytest.mark.parametrize("compute", [Compute.FLOAT32, Compute.BFLOAT16])
def test_learned_codes_lower_the_objective(family, compute):
    task, config = block_task(family), replace(MIXED, compute=compute)
    before, _ = measure(task, quantized(latents_of(task)), config)
    latents = learned(task, config)
    after, _ = measure(task, quantized(latents), config)
    assert after < 0.9 * before
    start = quantized(latents_of(task))
    for name, weight in quantized(latents).items():
        for group, begun in zip(weight.groups, start[name].groups, strict=True):
            assert group.columns.equal(begun.columns)
            assert not group.codes.equal(begun.codes) or not group.scale.equal(begun.scale)


def test_codes_and_scales_have_rates_of_their_own():
    task = block_task()
    start = latents_of(task)
    for changes, moved in (({"lr_scale": 0.0}, {"latent"}), ({"lr_latent": 0.0}, {"gain"})):
        end = learned(task, replace(MIXED, **changes))
        assert {part for part in ("latent", "gain") for name in start
                if not getattr(end[name], part).equal(getattr(start[name], part))} == moved  # fmt: skip


def test_rates_are_relative_to_the_size_of_the_matrix():
    task = block_task()
    latents = latents_of(task)
    groups = latent_parameters(latents, 0.5, 0.25)
    for group, latent in zip(groups, latents.values(), strict=False):
        assert group["params"] == [latent.latent]
        assert group["lr"] == pytest.approx(0.5 * latent.latent.abs().mean().item())
    assert groups[-1]["lr"] == 0.25 and len(groups[-1]["params"]) == len(latents)


def test_rates_follow_half_a_cosine():
    """One step moves a latent by its rate at most, so the moves show the schedule."""
    task = block_task()
    latents, trail = latents_of(task), []
    before = latents["mlp.up_proj"].latent.detach().clone()

    def on_step(step, steps, loss):
        trail.append(latents["mlp.up_proj"].latent.detach().clone())

    fit_latents(task, latents, replace(MIXED, lr_latent=1e-3), torch.Generator().manual_seed(0), on_step)
    moves = [(new - old).abs().max().item() for old, new in zip([before, *trail], trail, strict=False)]
    rate = 1e-3 * before.abs().mean().item()
    assert len(moves) == 16 and moves[0] == pytest.approx(rate, rel=1e-3)
    assert moves[-1] < 0.1 * moves[0]
    shares = [max(LAST_RATE, 0.5 * (1 + math.cos(math.pi * step / 16))) for step in range(16)]
    assert all(move <= 4 * rate * share for move, share in zip(moves, shares, strict=True))


def test_latents_learn_the_same_again():
    task = block_task()
    one, again, other = learned(task), learned(task), learned(task, seed=1)
    assert all(one[name].latent.equal(again[name].latent) for name in one)
    assert any(not one[name].latent.equal(other[name].latent) for name in one)


def test_scale_that_is_not_finite_is_named():
    task = block_task()
    latents = latents_of(task)
    with torch.no_grad():
        latents["self_attn.o_proj"].gain.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"block 0, epoch 0, step 0, from the factors of self_attn\.o_proj"):
        fit_latents(task, latents, MIXED, torch.Generator())
