"""Training adapters on tiny random models: what is learned, merging, and that a continued run is the same run."""

import copy
import math

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from torch import nn

pytest.importorskip("peft")

from ptq161 import restoration as restoration_module
from ptq161.adapters import merged_weight, on_grid, target_linears
from ptq161.binarize import SalientRange, as_stored, quantize_weight, reconstruct
from ptq161.config import PreprocessConfig
from ptq161.errors import NonFiniteError
from ptq161.restoration import COMPLETE, Restoration, newest_checkpoint

CONFIG = PreprocessConfig(steps=6, rank=4, lr=1e-2, batch_size=2, accumulation=1, seqlen=12)
SAMPLES = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def tiny(family="llama"):
    return build(FAMILIES[family]()).requires_grad_(False)


def linears_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]


def grids_of(model):
    def grid(weight):
        salient = torch.arange(weight.shape[1]) < weight.shape[1] // 4
        return as_stored(quantize_weight(weight, salient, salient_range=SalientRange.SALIENT, row_mean=True))

    return {name: grid(model.get_submodule(name).weight.detach()) for name in linears_of(model)}


def restoration(config=CONFIG, family="llama"):
    model, teacher = tiny(family), tiny(family)
    grids = grids_of(model)
    return Restoration(model, target_linears(linears_of(model), ()), config, teacher=teacher, grids=grids)


def train(run, folder, on_step=lambda *step: None):
    return run.train(SAMPLES, folder, on_step)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "changes", [{}, {"loss": "logits", "start": "quantized"}, {"through": True}, {"loss": "logits", "through": True}]
)
def test_every_kind_of_run_lowers_its_loss_on_the_samples(changes, tmp_path):
    config = CONFIG.replaced({"steps": 40, "dropout": 0.0, "lr": 2e-2, **changes})
    run = restoration(config)
    if config.start == "quantized":  # whatever differs from the teacher will do
        for name in run.targets:
            run.plain.get_submodule(name).weight.data += 0.1
    losses = train(run, tmp_path)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_only_the_targets_change_and_by_the_adapters_product(tmp_path):
    run = restoration()
    before = weights_of(run.plain)
    train(run, tmp_path)
    layer = run.model.base_model.model.get_submodule(run.targets[0])
    down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = merged_weight(before[f"{run.targets[0]}.weight"], down, up, CONFIG.alpha / CONFIG.rank)
    after = weights_of(run.merge())
    assert up.abs().max() > 0
    assert torch.equal(after[f"{run.targets[0]}.weight"], expected)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{name}.weight" for name in run.targets}


@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt-neox", "phi3"])
def test_the_merged_model_computes_what_the_adapters_did(family, tmp_path):
    run = restoration(CONFIG.replaced({"steps": 2}), family)
    train(run, tmp_path)
    run.model.eval()
    with torch.no_grad():
        expected = run.model(input_ids=SAMPLES, use_cache=False).logits
        actual = run.merge()(input_ids=SAMPLES, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_through_the_grid_the_forward_pass_is_the_quantized_model():
    run = restoration(CONFIG.replaced({"through": True, "compute": "float32"}))
    quantized = tiny()
    for name in run.targets:
        linear = quantized.get_submodule(name)
        linear.weight.data = on_grid(linear.weight, run.grids[name])
        assert not torch.equal(linear.weight, tiny().get_submodule(name).weight)
        assert linear.weight[:, -1].unique().numel() <= 2 * len(linear.weight)
    logits = quantized(input_ids=SAMPLES).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), SAMPLES[:, 1:].flatten())
    torch.testing.assert_close(run.loss(SAMPLES), expected)


def test_the_grids_are_those_of_the_reconstruction():
    grids = grids_of(tiny())
    name, grid = next(iter(grids.items()))
    assert reconstruct(grid).shape == tiny().get_submodule(name).weight.shape


def test_equal_to_the_teacher_there_is_nothing_to_learn_from_logits():
    run = restoration(CONFIG.replaced({"loss": "logits", "compute": "float32"}))
    assert abs(run.loss(SAMPLES).item()) < 1e-5


@pytest.mark.parametrize("stop", [1, 4])
def test_a_continued_run_ends_in_the_same_bytes(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(restoration_module, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = restoration()
    losses = train(whole, tmp_path / "whole")

    def interrupt(step, steps, loss):
        if step == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(restoration(), tmp_path / "cut", on_step=interrupt)
    assert newest_checkpoint(tmp_path / "cut").name == f"checkpoint-{stop}"
    continued = restoration()
    seen = []
    assert train(continued, tmp_path / "cut", on_step=lambda step, steps, loss: seen.append(step)) == losses
    assert seen == list(range(stop + 1, CONFIG.steps + 1))
    assert same(weights_of(continued.merge()), weights_of(whole.merge()))


def test_a_finished_run_is_not_repeated(tmp_path):
    first = restoration()
    losses = train(first, tmp_path)
    second = restoration()
    assert train(second, tmp_path, on_step=lambda *step: pytest.fail("a step was repeated")) == losses
    assert same(weights_of(second.merge()), weights_of(first.merge()))


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path):
    train(restoration(), tmp_path)
    newest = newest_checkpoint(tmp_path)
    broken = tmp_path / "checkpoint-99"
    broken.mkdir()
    assert newest_checkpoint(tmp_path) == newest and not broken.exists()
    (newest / COMPLETE).unlink()
    assert newest_checkpoint(tmp_path) is None


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = restoration()
    run.model.base_model.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="at step 1; lower --lr"):
        train(run, tmp_path)


def test_the_seed_decides(tmp_path):
    runs = []
    for index, seed in enumerate((0, 0, 1)):
        run = restoration(CONFIG.replaced({"seed": seed}))
        train(run, tmp_path / str(index))
        runs.append(weights_of(run.merge()))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_training_leaves_the_model_it_was_given_unmoved(tmp_path):
    run = restoration()
    before = copy.deepcopy(weights_of(run.plain))
    train(run, tmp_path)
    assert same(before, weights_of(run.plain))
