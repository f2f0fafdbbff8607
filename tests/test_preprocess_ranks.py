"""The restorative adapters on two gloo ranks against one process: the same steps, files and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from together import on_ranks
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("peft")

from ptq161 import ranks
from ptq161.preprocess import preprocess

SETTINGS = {
    "preset": "paper",
    "steps": 3,
    "rank": 2,
    "lr": 1e-2,
    "seqlen": 16,
    "accumulation": 4,
    "dropout": 0.0,  # each rank drops its own
    "compute": "float32",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, text, and the model quantized once."""
    from soak import make_model

    from ptq161.pipeline import quantize

    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    recipe = {"preset": "paper", "salient_ratio": 0.2, "samples": 4, "seqlen": 16, "epochs": 1}
    quantize(folder / "model", folder / "once", calib=str(folder / "text.txt"), **recipe)
    return folder


def run(folder, out, **changes):
    """The stage on the tiny model of `folder`, with its perplexities."""
    text = str(folder / "text.txt")
    settings = {"quantized": folder / "once", "ppl": [text], "ppl_seqlen": 16, "max_windows": 5}
    return preprocess(folder / "model", out, **{"text": [text]} | settings | SETTINGS | changes)


def with_gradients(folder, out, **changes):
    """What the stage returns, and the gradients of each of its steps."""
    steps = []

    def keep(optimizer, *_):
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        return run(folder, out, **changes), steps[: SETTINGS["steps"]]
    finally:
        handle.remove()


def batches_of_two(folder, out):
    """Ranks that divide the samples of a pass instead of the passes of a step."""
    return with_gradients(folder, out, batch_size=4, accumulation=1)


@pytest.mark.parametrize("divided", [with_gradients, batches_of_two])
def test_steps_and_results_are_those_of_one_process(divided, folder, tmp_path):
    alone, expected = divided(folder, tmp_path / "alone")
    (result, gradients), (other, others) = on_ranks(tmp_path, divided, folder, tmp_path / "out")
    assert len(gradients) == len(expected) == SETTINGS["steps"]
    flat = [torch.cat([gradient.flatten() for gradient in step]) for step in (expected[0], gradients[0])]
    assert flat[0].norm() > 0 and (flat[1] - flat[0]).norm() <= 1e-4 * flat[0].norm()
    for mine, theirs in zip(gradients, others, strict=True):
        assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True)), "ranks must take the same steps"
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-3) == other["losses"]
    for stage, found in result["perplexity"][str(folder / "text.txt")].items():
        assert found["ppl"] == pytest.approx(alone["perplexity"][str(folder / "text.txt")][stage]["ppl"], rel=0.02)
    weights, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-2, atol=1e-4)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ranks"] == 2


def ended(folder, out):
    """A run that ends on rank 1 after a step, with a checkpoint after every step."""
    from ptq161 import restoration

    restoration.SECONDS_BETWEEN_SAVES = 0.0

    def on_progress(progress):
        if ranks.rank() == 1 and (progress.phase, progress.step) == ("restore", 2):
            raise RuntimeError("killed")

    return run(folder, out, on_progress=on_progress)


def test_an_ended_run_continues_to_the_same_weights(folder, tmp_path):
    on_ranks(tmp_path, run, folder, tmp_path / "whole")
    one, other = on_ranks(tmp_path, ended, folder, tmp_path / "out")
    assert one.startswith("Ptq161Error: lost contact") and other == "RuntimeError: killed"
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / "adapters").glob("checkpoint-1/complete"))
    for result in on_ranks(tmp_path, run, folder, tmp_path / "out"):
        assert result["ranks"] == 2, result
    one, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == whole


def refused(folder, out, changes):
    """A run with settings that do not go with two ranks."""
    return run(folder, out, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 3}, "one of them has to be a multiple of the 2 ranks; give --set accumulation=4"),
        ({"through": True}, "leave it out, or start without torchrun"),
        ({"text": ["nowhere.txt"]}, "cannot read text from nowhere.txt"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes, message, folder, tmp_path):
    one, other = on_ranks(tmp_path, refused, folder, tmp_path / "out", changes)
    assert message in one and other.startswith("FailedElsewhere")
    assert not (tmp_path / "out.partial").exists()
