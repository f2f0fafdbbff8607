"""Two gloo ranks against one process: the same statistics, gradients, losses and files, up to the order of sums."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from together import on_ranks
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ptq161
from ptq161 import pipeline, ranks, walk
from ptq161.blocks import second_moments
from ptq161.config import preset_named
from ptq161.dense import DenseModel
from ptq161.discovery import first_hidden
from ptq161.errors import InputError
from ptq161.evaluate.perplexity import perplexity
from ptq161.fit import shuffled_batches
from ptq161.sensitivity import measure_squares
from ptq161.space import MEMORY

CPU = torch.device("cpu")
SAMPLES = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "samples": 4,
    "seqlen": 16,
    "bits": 3.0,
    "epochs": 2,
    "batch_size": 2,
    "distill_tokens": 8 * 32,
    "distill_lr_latent": 1e-2,
    "distill_lr_scale": 5e-3,
    "compute": "float32",
    "dtype": "float32",
}


# What the operations do


def test_alone_everything_is_what_it_was():
    tensor = torch.arange(3.0)
    ranks.add(tensor)
    ranks.greatest(tensor)
    assert tensor.tolist() == [0, 1, 2]
    assert (ranks.count(), ranks.rank(), ranks.first(), ranks.count_here()) == (1, 0, True, 1)
    assert ranks.share(tensor).equal(tensor) and ranks.own([2, 0]) == [2, 0]
    assert ranks.total(0.1, 2) == (0.1, 2.0)
    assert ranks.from_first(lambda: 3) == 3 and ranks.gathered(4) == [4]


def operations():
    """One call of each operation."""
    number = float(ranks.rank() + 1)
    summed, largest = torch.tensor([number, 1.0]), torch.tensor([number, -number])
    ranks.add(summed)
    ranks.greatest(largest)
    learned = torch.zeros(2, requires_grad=True)
    if ranks.first():  # the other rank has had no sample
        learned.sum().backward()
    ranks.add_gradients([learned])
    order = []
    with ranks.first_goes_first():
        order.append(time.monotonic())
        time.sleep(0.2)
    return {
        "summed": summed.tolist(),
        "largest": largest.tolist(),
        "gradient": learned.grad.tolist(),
        "share": ranks.share(torch.arange(5)).tolist(),
        "own": ranks.own([4, 1, 2, 3]),
        "made": ranks.from_first(ranks.rank),
        "gathered": ranks.gathered(ranks.rank()),
        "total": ranks.total(number, 0.5),
        "began": order[0],
    }


def test_each_operation_on_two_ranks(tmp_path):
    one, other = on_ranks(tmp_path, operations)
    assert other.pop("began") - one.pop("began") >= 0.2
    assert (one.pop("share"), other.pop("share")) == ([0, 2, 4], [1, 3])
    assert (one.pop("own"), other.pop("own")) == ([2, 1], [0, 1])
    assert one == other
    assert one == {
        "summed": [3, 2],
        "largest": [2, -1],
        "gradient": [1, 1],
        "made": 0,
        "gathered": [0, 1],
        "total": (3.0, 1.0),
    }


def fail(how):
    """Rank 0 fails, or the ranks differ."""
    if how == "from_first":
        ranks.from_first(lambda: math.sqrt(-1))
    elif how == "first_goes_first":
        with ranks.first_goes_first():
            raise InputError("there is no such file")
    else:
        ranks.check_same("codes", f"checksum {ranks.rank()}")


@pytest.mark.parametrize(
    ("how", "first", "other"),
    [
        ("from_first", "ValueError: math domain error", "FailedElsewhere: rank 0 failed"),
        ("first_goes_first", "InputError: there is no such file", "FailedElsewhere: rank 0 failed"),
        ("check_same", "Ptq161Error: codes differ between ranks 0 and 1", "Ptq161Error: codes differ"),
    ],
)
def test_no_rank_waits_for_one_that_failed(how, first, other, tmp_path):
    one, two = on_ranks(tmp_path, fail, how)
    assert one.startswith(first) and two.startswith(other)


def vanish():
    """Rank 1 ends without a word, and rank 0 waits for it."""
    if not ranks.first():
        return
    ranks.total(1.0)


def test_a_rank_that_is_gone_is_one_line_on_the_others(tmp_path):
    one, _ = on_ranks(tmp_path, vanish)
    assert one.startswith("Ptq161Error: lost contact with another rank")
    assert one.endswith("what was finished is kept, give the same command again")


@pytest.mark.parametrize(("samples", "size"), [(7, 1), (8, 2), (7, 4), (3, 8), (12, 6)])
def test_batches_hold_every_sample_once_and_whole_ones_divide_evenly(samples, size):
    batches = shuffled_batches(samples, size, torch.Generator().manual_seed(1))
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    for number in (n for n in range(1, size + 1) if size % n == 0):
        for batch in batches[:-1]:
            counts = [sum(index % number == rank for index in batch) for rank in range(number)]
            assert counts == [size // number] * number


def test_batches_of_one_are_a_plain_permutation():
    batches = shuffled_batches(9, 1, torch.Generator().manual_seed(3))
    assert [index for batch in batches for index in batch] == torch.randperm(
        9, generator=torch.Generator().manual_seed(3)
    ).tolist()


# What it comes to


def numbers():
    """Statistics, moments and squares of a tiny model, whichever rank."""
    config = preset_named("fast").quant.replaced({"bits": 3.0, "epochs": 0})
    model = DenseModel.of(build(FAMILIES["llama"]()))
    prepared = walk.prepare(model, SAMPLES, config, None)
    streams = walk.Streams(0, *(first_hidden(*walk._around(model), ranks.share(SAMPLES)) for _ in range(2)))
    streams.quantized.mul_(1.1)
    task = walk._block_task(prepared, 0, streams, config, CPU, MEMORY)
    found = {}
    for name, stat in task.stats.items():
        found |= {f"{name} {key}": getattr(stat, key) for key in ("absmax", "abs_sum", "square_sum", "tokens")}
    found["moments"], found["cross"] = second_moments(task, "mlp.down_proj", {})
    hidden = first_hidden(*walk._around(model), ranks.share(SAMPLES))
    seed = torch.Generator().manual_seed(0)
    arguments = (prepared.traced.calls, prepared.shapes, hidden, SAMPLES, seed, CPU, torch.bfloat16, MEMORY)
    for _, squares in measure_squares(model, *arguments):
        for name, sums in squares.items():
            found |= {f"{name} inputs": sums.inputs, f"{name} gradients": sums.gradients, f"{name} count": sums.tokens}
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in found.items()}


def test_statistics_are_those_of_one_process(tmp_path):
    alone = numbers()
    for found in on_ranks(tmp_path, numbers):
        assert found.keys() == alone.keys() and len(alone) > 60
        for name, value in alone.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def first_gradients(folder, out, preset):
    """Gradients of the first step of each optimizer of a run, and of what kind the run was."""
    seen = {}

    def keep(optimizer, *_):
        if id(optimizer) not in seen:
            seen[id(optimizer)] = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            kept.append(optimizer)  # so that no other gets its id

    kept = []
    handle = register_optimizer_step_pre_hook(keep)
    try:
        result = quantize(folder, out, preset)
    finally:
        handle.remove()
    return result, list(seen.values())


def quantize(folder, out, preset, on_progress=lambda progress: None, **changes):
    """The main job on the tiny model of `folder`."""
    settings = {"preset": preset, "calib": str(folder / "text.txt"), **SETTINGS, **changes}
    return pipeline.quantize(folder / "model", out, on_progress=on_progress, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and text."""
    from soak import make_model

    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return folder


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_gradients_and_losses_are_those_of_one_process(preset, folder, tmp_path):
    expected, alone = first_gradients(folder, tmp_path / "alone", preset)
    results = on_ranks(tmp_path, first_gradients, folder, tmp_path / "out", preset)
    result, gradients = results[0]
    assert len(gradients) == len(alone) == 4 + (preset == "best")
    for one, other in zip(alone[0], gradients[0], strict=True):  # the first block: later ones start from other codes
        assert (one - other).norm() <= 1e-4 * one.norm()
    for mine, theirs in zip(gradients, results[1][1], strict=True):
        assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True)), "ranks must take the same steps"
    for block, wanted in zip(result["blocks"], expected["blocks"], strict=True):
        assert block["loss_last"] == pytest.approx(wanted["loss_last"], rel=0.05)
    assert result["blocks"][0]["loss_first"] == pytest.approx(expected["blocks"][0]["loss_first"], rel=1e-5)
    assert results[1][0]["blocks"] == result["blocks"]
    if preset == "best":
        for key in ("held_out_first", "held_out_last"):
            assert result["distillation"][key] == pytest.approx(expected["distillation"][key], rel=0.05)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["ranks"] == 2


def stopped(folder, out):
    """A run that ends on one rank once a block is done, and on the other, which waits, for that reason."""

    def on_progress(progress):
        if ranks.rank() == 1 and (progress.block, progress.phase) == (2, "learn"):
            raise InputError("killed")

    return quantize(folder, out, "best", on_progress)


def test_an_ended_run_continues_to_the_same_bytes(folder, tmp_path):
    from soak import contents

    on_ranks(tmp_path, quantize, folder, tmp_path / "whole", "best")
    one, other = on_ranks(tmp_path, stopped, folder, tmp_path / "out")
    assert one.startswith("Ptq161Error: lost contact") and other.endswith("killed")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="ranks: 2 -> 1"):
        quantize(folder, tmp_path / "out", "best")
    on_ranks(tmp_path, quantize, folder, tmp_path / "out", "best")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_streams_that_one_rank_saved_alone_are_not_used(tmp_path):
    def folder_of(rank):
        return {path.name for path in tmp_path.glob(f"out.partial/streams-*-{rank:05}.safetensors")}

    (tmp_path / "out.partial").mkdir()
    one, other = on_ranks(tmp_path, streams_apart, tmp_path / "out")
    assert (one, other) == (1, 1)
    assert len(folder_of(0)) == 2 and len(folder_of(1)) == 1


def streams_apart(out):
    """Rank 0 has saved its streams into blocks 1 and 2, rank 1 only those into block 1. Which are taken up?"""
    from safetensors.torch import save_file

    from ptq161.checkpoint import WorkFolder

    work = WorkFolder(out)
    for block in (1, 2) if ranks.first() else (1,):
        save_file({"full": torch.zeros(1, 2, 3), "quantized": torch.ones(1, 2, 3)}, work._streams(block))
    return work.load_streams(MEMORY).next_block


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples=1 for 2 ranks: expected one each, at least"),
        ({"batch_size": 3}, "batch_size=3 cannot be divided among 2 ranks"),
        ({"distill_batch_size": 5}, "give --set distill_batch_size=6"),
    ],
)
def test_what_cannot_be_divided_is_refused(changes, message, folder, tmp_path):
    one, other = on_ranks(tmp_path, refused, folder, tmp_path / "out", changes)
    assert message in one and other.startswith("FailedElsewhere")
    assert not (tmp_path / "out.partial").exists()


def refused(folder, out, changes):
    """A run with settings that do not go with two ranks."""
    return quantize(folder, out, "best", **changes)


def windows():
    """Perplexity of a tiny model over five windows."""
    tokens = torch.randint(VOCABULARY, (107,), generator=torch.Generator().manual_seed(3))
    return perplexity(build(FAMILIES["llama"]()), tokens, 20)


def test_perplexity_is_that_of_one_process(tmp_path):
    alone = windows()
    for result in on_ranks(tmp_path, windows):
        assert result == alone | {"ppl": pytest.approx(alone["ppl"], rel=1e-6)}


# torchrun itself


def torchrun(*arguments):
    """The command under torchrun, two ranks; returns the process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(ptq161.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launch, "-m", "ptq161", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def rank_processes(launcher):
    """Process ids of the ranks of a launcher, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(value[5:]): int(child) for value in variables if value.startswith(b"RANK=")}
    return found


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_same_command_continues(folder, tmp_path):
    arguments = ["quantize", folder / "model", tmp_path / "out", "--calib", folder / "text.txt", "--json"]
    arguments += ["--preset", "fast", "--samples", "4", "--seqlen", "16", "--bits", "3", "--epochs", "40"]
    arguments += ["--set", "batch_size=2"]
    launcher = torchrun(*arguments)
    while not list(tmp_path.glob("out.partial/block-00000.json")):
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)
    os.kill(rank_processes(launcher)[1], signal.SIGKILL)
    stdout, stderr = launcher.communicate()
    assert launcher.returncode != 0 and stdout == ""
    said = [line for line in stderr.splitlines() if line.startswith("ptq161: error: ")]
    assert said and all("another rank" in line and "kept" in line for line in said)
    assert not (tmp_path / "out").exists()
    launcher = torchrun(*arguments)
    stdout, stderr = launcher.communicate()
    assert launcher.returncode == 0, stderr
    assert len(json.loads(stdout)["blocks"]) == 4, "one rank prints one object"
    assert stderr.count("block 4/4") == 1


@pytest.mark.slow
def test_torchrun_says_once_what_is_wrong(tmp_path):
    launcher = torchrun("quantize", tmp_path / "nothing", tmp_path / "out", "--calib", "text.txt")
    stdout, stderr = launcher.communicate()
    assert launcher.returncode != 0 and stdout == ""
    lines = [line for line in stderr.splitlines() if line.startswith("ptq161: error: ")]
    assert len(lines) == 1 and str(tmp_path / "nothing") in lines[0]
