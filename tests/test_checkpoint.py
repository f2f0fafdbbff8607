"""What tuning the whole model needs from the work folder: latents and the state of an interrupted run, bit for bit."""

import pytest
import torch
from test_latent import latent_weight

from ptq161.binarize import reconstruct
from ptq161.checkpoint import WorkFolder
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.packing import layout_of


@pytest.fixture
def work(tmp_path):
    """A work folder taken for a job."""
    folder = WorkFolder(tmp_path / "out")
    with folder.open({"job": 1}, restart=False):
        yield folder


def layout(latents):
    return ModelLayout({name: PackedLinearSpec(layout_of(weight.quantized())) for name, weight in latents.items()})


def test_latents_come_back_as_they_went(work):
    latents = {f"blocks.{index}.linear": latent_weight(seed=index) for index in range(3)}
    for index, (name, weight) in enumerate(latents.items()):
        work.save_latents(index, {name: weight})
    loaded = work.load_latents(layout(latents), 0, 3)
    assert list(loaded) == list(latents)
    for name, weight in latents.items():
        again = loaded[name]
        assert again.latent.equal(weight.latent) and again.columns.equal(weight.columns)
        assert (again.widths, again.sizes) == (weight.widths, weight.sizes)
        assert reconstruct(again.quantized()).equal(reconstruct(weight.quantized()))
        assert again.dense(torch.float32).equal(weight.dense(torch.float32))
        assert again.gain.equal(torch.ones_like(again.gain)), "rates are relative to the scales it starts from"
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in (again.latent, again.gain))


def test_latents_can_be_learned_and_saved_anew(work):
    latents = {"linear": latent_weight()}
    work.save_latents(0, latents)
    loaded = work.load_latents(layout(latents), 0, 1)
    with torch.no_grad():
        loaded["linear"].latent.add_(1)
        loaded["linear"].gain.mul_(2)
    assert work.load_latents(layout(latents), 0, 1)["linear"].latent.equal(latents["linear"].latent)
    work.save_latents(0, loaded)
    again = work.load_latents(layout(latents), 0, 1)["linear"]
    assert again.latent.equal(loaded["linear"].latent)
    assert again.scales().equal(loaded["linear"].scales())


def test_only_the_blocks_asked_for_are_read(work):
    latents = {"blocks.1.linear": latent_weight()}
    work.save_latents(1, latents)
    assert list(work.load_latents(layout(latents), 1, 2)) == ["blocks.1.linear"]


def test_state_of_a_distillation_comes_back_as_it_went(work):
    assert work.load_distillation() is None
    generator = torch.Generator().manual_seed(0)
    transposed = torch.randn(3, 5, generator=generator).T  # not contiguous: safetensors would refuse it
    state = {
        "value a.latent": transposed,
        "step a.latent": torch.tensor(3.0),
        "step": torch.tensor(3),
        "held_out_first": torch.tensor(1 / 3, dtype=torch.float64),
    }
    work.save_distillation(state)
    loaded = work.load_distillation()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(state[name]) and loaded[name].dtype == state[name].dtype for name in state)
    work.save_distillation(state | {"step": torch.tensor(4)})
    assert int(work.load_distillation()["step"]) == 4
    assert not list(work.path.glob("*.new"))


def test_failed_write_keeps_the_state_before(work, monkeypatch):
    work.save_distillation({"step": torch.tensor(3)})

    def disk_full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptq161.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        work.save_distillation({"step": torch.tensor(4)})
    assert int(work.load_distillation()["step"]) == 3
    assert not list(work.path.glob("*.new"))


def test_restart_drops_latents_and_state(tmp_path):
    latents = {"linear": latent_weight()}
    for restart in (False, True):
        folder = WorkFolder(tmp_path / "out")
        with folder.open({"job": 1}, restart=restart):
            assert folder.load_distillation() is None
            assert not list(folder.path.glob("latents-*"))
            folder.save_latents(0, latents)
            folder.save_distillation({"step": torch.tensor(1)})
