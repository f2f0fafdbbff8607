"""The main job: resuming, refusing, counting, predicting; all on a tiny Llama of four blocks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModelForCausalLM

import ptq161
from ptq161 import pipeline
from ptq161.blocks import advance
from ptq161.causal import CAUSAL, attend_causally
from ptq161.checkpoint import WorkFolder
from ptq161.config import CalibrationConfig, QuantConfig
from ptq161.data import calibration_tokens
from ptq161.discovery import decoder_blocks, first_hidden, trace
from ptq161.errors import InputError, NonFiniteError, Ptq161Error, UnsupportedModule
from ptq161.fit import objective
from ptq161.inspection import inspect
from ptq161.layout import ModelLayout
from ptq161.verify import verify

SETTINGS = {
    "preset": "paper",
    "samples": 3,
    "seqlen": 16,
    "epochs": 1,
    "lr_scale": 2e-3,
    "lr_angular": 4e-3,
    "salient_ratio": 0.25,
    "compute": "float32",
    "dtype": "float32",
}
BLOCKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """Folder of a tiny Llama with four blocks."""
    path = tmp_path_factory.mktemp("source") / "model"
    config = FAMILIES["llama"]()
    config.num_hidden_layers = BLOCKS
    build(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(source, calibration_file):
    """quantize with the settings of this file, some of them changed."""

    def quantize(out, model=source, **changes):
        return pipeline.quantize(model, out, **{"calib": str(calibration_file), **SETTINGS, **changes})

    return quantize


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run):
    """(result, folder) of an uninterrupted run. Do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run(out), out


class Interruption(Exception):
    """Stands for whatever ends a run."""


def interrupt(block, phase):
    def on_progress(progress):
        if (progress.block, progress.phase) == (block, phase):
            raise Interruption

    return on_progress


def contents(folder):
    """Every file of a checkpoint as bytes, what run.json says about time left out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files.pop("run.json"))
    record.pop("timing")
    return files | {"run.json": record}


def assert_same_checkpoint(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def stored_bytes(folder, linears):
    """Bytes in the safetensors files under these linears, biases apart, read from the headers alone."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name.rpartition(".")[0] in linears and not name.endswith(".bias"):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def linear_weights(folder):
    """Name -> number of weights of every linear in the decoder blocks of a dense model folder."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


# What a run reports


def test_result_has_the_fields_of_the_contract(finished):
    result, out = finished
    contract = {"bits_per_weight", "paper_bits", "file_bytes", "quantized_weights", "dense_linears", "seconds"}
    assert contract | {"peak_rss_bytes", "blocks"} <= result.keys()
    assert json.loads(json.dumps(result)) == result
    assert [set(block) for block in result["blocks"]] == [{"index", "loss_first", "loss_last", "seconds"}] * BLOCKS
    assert [block["index"] for block in result["blocks"]] == list(range(BLOCKS))
    assert result["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result["dense_linears"] == 0
    assert 0 < sum(block["seconds"] for block in result["blocks"]) < result["seconds"]
    assert result["peak_rss_bytes"] > 1 << 20


def test_bits_are_the_bytes_in_the_file(finished, source):
    result, out = finished
    weights = linear_weights(source)
    assert result["quantized_weights"] == sum(weights.values())
    assert result["bits_per_weight"] == 8 * stored_bytes(out, weights) / sum(weights.values())
    layout = ModelLayout.from_dict(json.loads((out / "config.json").read_text())["quantization_config"])
    assert result["paper_bits"] == pytest.approx(layout.paper_bits)


def test_learning_lowers_the_loss_of_every_block(finished):
    assert all(block["loss_last"] < block["loss_first"] for block in finished[0]["blocks"])


def test_last_loss_is_that_of_the_factors_in_the_file(finished, source, calibration_file, tokenizer):
    """Both branches anew, from the finished checkpoint: full stream, quantized stream, stored weights."""
    result, out = finished
    calibration = CalibrationConfig((str(calibration_file),), samples=SETTINGS["samples"], seqlen=SETTINGS["seqlen"])
    tokens = calibration_tokens(calibration, tokenizer)
    device = torch.device("cpu")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    stored = ptq161.load(out, mode="dense")
    _, blocks = decoder_blocks(original)
    _, stored_blocks = decoder_blocks(stored)
    calls = trace(original, blocks, tokens).calls
    full = quantized = first_hidden(original, blocks, tokens)
    for block, stored_block, call, record in zip(blocks, stored_blocks, calls, result["blocks"], strict=True):
        full, local = advance(block, call, full, device), advance(block, call, quantized, device)
        quantized = advance(stored_block, call, quantized, device)
        each = [objective(*(t[i : i + 1] for t in (quantized, full, local)), QuantConfig()) for i in range(len(tokens))]
        assert record["loss_last"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)


def test_progress_passes_through_every_phase_of_every_block(run, tmp_path):
    seen = []
    run(tmp_path / "out", blocks=(1, 3), on_progress=seen.append)
    steps = SETTINGS["epochs"] * SETTINGS["samples"]
    assert [(p.block, p.phase) for p in seen] == [
        (1, "prepare"),
        *[(block, phase) for block in (1, 2) for phase in ("targets", *["learn"] * steps, "save")],
    ]
    assert {(p.first, p.last) for p in seen} == {(1, 3)}
    assert [(p.step, p.steps) for p in seen if p.phase == "learn"] == 2 * [(i, steps) for i in range(1, steps + 1)]
    assert all(p.loss is None or p.loss > 0 for p in seen)
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)


def test_every_stage_attends_causally_and_the_callers_model_stays_as_it_is(run, source, tokenizer, tmp_path):
    calls = Counter()
    phase = "before"

    def attend(*args, **kwargs):
        calls[phase] += 1
        return attend_causally(*args, **kwargs)

    def on_progress(progress):
        nonlocal phase
        phase = progress.phase

    model = AutoModelForCausalLM.from_pretrained(source)
    before = model.config._attn_implementation
    AttentionInterface.register(CAUSAL, attend)
    try:
        run(
            tmp_path / "out",
            model,
            tokenizer=tokenizer,
            preset="fast",
            salient_ratio=None,
            bits=2.5,
            on_progress=on_progress,
        )
    finally:
        AttentionInterface.register(CAUSAL, attend_causally)
    assert model.config._attn_implementation == before
    assert {"measure", "targets", "learn"} <= set(+calls)


# The same again


def test_same_settings_give_the_same_bytes(finished, run, tmp_path):
    run(tmp_path / "out")
    assert_same_checkpoint(finished[1], tmp_path / "out")


def test_another_seed_gives_others(finished, run, tmp_path):
    run(tmp_path / "out", seed=1)
    assert contents(finished[1])["model.safetensors"] != contents(tmp_path / "out")["model.safetensors"]


def test_model_in_memory_gives_the_same_weights(finished, run, source, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    run(tmp_path / "out", model=model, tokenizer=tokenizer)
    assert contents(finished[1])["model.safetensors"] == contents(tmp_path / "out")["model.safetensors"]


def test_model_in_memory_needs_its_tokenizer(run, source, tmp_path):
    with pytest.raises(InputError, match="tokenizer"):
        run(tmp_path / "out", model=AutoModelForCausalLM.from_pretrained(source))


# Interrupted and continued


@pytest.mark.parametrize(("block", "phase"), [(0, "prepare"), (0, "learn"), (2, "targets"), (2, "learn"), (3, "save")])
def test_interrupted_run_continues_to_the_same_bytes(finished, run, tmp_path, block, phase):
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        run(out, on_progress=interrupt(block, phase))
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    seen = []
    result = run(out, on_progress=seen.append)
    assert {progress.block for progress in seen} == set(range(block, BLOCKS)), "a finished block was done again"
    assert_same_checkpoint(finished[1], out)
    assert [b["index"] for b in result["blocks"]] == list(range(BLOCKS))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "work was left behind"


def test_interrupted_several_times(finished, run, tmp_path):
    for block in (1, 1, 2):
        with pytest.raises(Interruption):
            run(tmp_path / "out", on_progress=interrupt(block, "learn"))
    run(tmp_path / "out")
    assert_same_checkpoint(finished[1], tmp_path / "out")


def test_failure_while_writing_the_result_keeps_the_blocks(finished, run, tmp_path, monkeypatch):
    whole = pipeline.save_packed

    def disk_full(folder, *arguments, **more):
        whole(folder, *arguments, **more)
        (Path(folder) / "config.json").unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "save_packed", disk_full)
    with pytest.raises(Ptq161Error, match=r"No space left on device.*finished blocks are kept") as error:
        run(tmp_path / "out")
    assert error.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    seen = []
    run(tmp_path / "out", on_progress=seen.append)
    assert seen == [], "a finished block was done again"
    assert_same_checkpoint(finished[1], tmp_path / "out")


@pytest.mark.slow
def test_disk_that_fails_at_any_write_costs_no_finished_block(finished, run, tmp_path, monkeypatch):
    """Every third write to the disk fails in turn, until a run comes through."""
    fsync, calls = os.fsync, 0

    def failing(descriptor):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    blocks_done = 0
    for limit in range(1, 100, 3):
        calls, seen = 0, []
        try:
            run(tmp_path / "out", on_progress=seen.append)
        except Ptq161Error as error:
            assert "No space left on device" in str(error)
            kept = len(list((tmp_path / "out.partial").glob("block-*.json"))) if limit > 1 else 0
            assert kept >= blocks_done
            blocks_done = kept
        else:
            break
    assert_same_checkpoint(finished[1], tmp_path / "out")


@pytest.mark.slow
def test_killed_process_is_continued(finished, run, source, calibration_file, tmp_path):
    script = f"""
import os, signal, sys
import torch
from ptq161 import pipeline

def on_progress(progress):
    if (progress.block, progress.phase) == (2, "learn"):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
pipeline.quantize({str(source)!r}, {str(tmp_path / "out")!r}, calib={str(calibration_file)!r},
                  on_progress=on_progress, **{SETTINGS!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(ptq161.__file__).parents[1])}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    seen = []
    run(tmp_path / "out", on_progress=seen.append)
    assert {progress.block for progress in seen} == {2, 3}
    assert_same_checkpoint(finished[1], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 3}, "epochs"),
        ({"salient_ratio": 0.5}, "salient_ratio"),
        ({"samples": 4}, "calibration"),
        ({"seed": 7}, "seed"),
        ({"blocks": (0, 3)}, "blocks"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_settings_do_not_continue_a_run(run, tmp_path, changes, named):
    with pytest.raises(Interruption):
        run(tmp_path / "out", on_progress=interrupt(1, "targets"))
    before = contents_of_work(tmp_path / "out.partial")
    with pytest.raises(InputError, match=rf"other settings \(.*{named}.*--restart") as error:
        run(tmp_path / "out", **changes)
    assert "lr_scale" not in str(error.value), "only what differs is named"
    assert "\n" not in str(error.value)
    assert contents_of_work(tmp_path / "out.partial") == before


def contents_of_work(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_model_does_not_continue_a_run(run, tmp_path, llama_folder):
    with pytest.raises(Interruption):
        run(tmp_path / "out", on_progress=interrupt(1, "learn"))
    with pytest.raises(InputError, match=r"other settings \(.*model"):
        run(tmp_path / "out", model=llama_folder)


def test_restart_drops_the_unfinished_run(finished, run, tmp_path):
    with pytest.raises(Interruption):
        run(tmp_path / "out", epochs=2, on_progress=interrupt(2, "learn"))
    seen = []
    run(tmp_path / "out", restart=True, on_progress=seen.append)
    assert {progress.block for progress in seen} == set(range(BLOCKS))
    assert_same_checkpoint(finished[1], tmp_path / "out")


def test_second_process_is_refused(run, tmp_path):
    with (
        WorkFolder(tmp_path / "out").open({}, restart=False),
        pytest.raises(InputError, match="another process is quantizing into"),
    ):
        run(tmp_path / "out")


def test_folder_that_only_looks_like_work_in_progress_is_left_alone(run, tmp_path):
    other = tmp_path / "out.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(InputError, match=r"out\.partial exists and is not an unfinished run"):
            run(tmp_path / "out", restart=restart)
    assert (other / "thesis.txt").read_text() == "mine"


# OUT


def test_existing_out_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"out exists.*--overwrite"):
        run(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_overwrite_replaces_out_when_the_new_one_is_complete(finished, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(Interruption):
        run(out, overwrite=True, on_progress=interrupt(3, "save"))
    assert [path.name for path in out.iterdir()] == ["old.txt"]
    run(out, overwrite=True)
    assert_same_checkpoint(finished[1], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_that_is_a_file_is_refused_even_with_overwrite(run, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="is not a folder"):
        run(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "a file"


def test_out_below_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file" / "out")


def test_out_where_nothing_can_be_made_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere, and tests may run as root
    with pytest.raises(InputError, match=r"cannot write to .*no permission"):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_too_full_for_the_result_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 5000, 5000))
    with pytest.raises(InputError, match=r"GB free, this run needs"):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_parents_of_out_are_made(run, tmp_path):
    run(tmp_path / "a" / "b" / "out", blocks=(0, 1))
    assert ptq161.load(tmp_path / "a" / "b" / "out")


# Streams in files


@pytest.mark.parametrize("block", [None, 2])
def test_offloaded_streams_give_the_same_bytes_also_when_continued(finished, run, tmp_path, block):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if block is not None:
        with pytest.raises(Interruption):
            run(tmp_path / "out", offload=scratch, on_progress=interrupt(block, "learn"))
    run(tmp_path / "out", offload=scratch)
    assert_same_checkpoint(finished[1], tmp_path / "out")
    assert list(scratch.iterdir()) == []


def test_offload_folder_that_does_not_exist_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"--offload .*nowhere: expected a folder that exists"):
        run(tmp_path / "out", offload=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("renamed", [False, True])
def test_publication_that_was_cut_off_is_completed_by_the_next_command(finished, run, tmp_path, monkeypatch, renamed):
    def killed(work):
        if renamed:
            work.result.rename(work.out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "complete", lambda work: killed(work) if work.result.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert (tmp_path / "out").exists() == renamed
    with pytest.raises(InputError, match="out exists"):
        run(tmp_path / "out")
    assert_same_checkpoint(finished[1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Some blocks only


def test_blocks_outside_the_range_stay_dense(run, source, tmp_path):
    result = run(tmp_path / "out", blocks=(1, 3))
    assert [block["index"] for block in result["blocks"]] == [1, 2]
    weights = linear_weights(source)
    inside = {name: number for name, number in weights.items() if name.split(".")[2] in ("1", "2")}
    assert result["dense_linears"] == len(weights) - len(inside) == 14
    assert result["quantized_weights"] == sum(inside.values())
    assert result["bits_per_weight"] == 8 * stored_bytes(tmp_path / "out", inside) / sum(inside.values())
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        if name.rpartition(".")[0] in inside:
            assert after[name].dtype == torch.uint8
        else:
            assert after[name].equal(tensor)
    tokens = torch.randint(4, VOCABULARY, (1, 9))
    assert ptq161.load(tmp_path / "out")(tokens).logits.isfinite().all()


def test_first_blocks_do_not_depend_on_later_ones(finished, run, tmp_path):
    run(tmp_path / "out", blocks=(0, 2))
    whole, part = (load_file(folder / "model.safetensors") for folder in (finished[1], tmp_path / "out"))
    names = [name for name in whole if name.startswith(("model.layers.0.", "model.layers.1."))]
    assert names
    assert all(whole[name].equal(part[name]) for name in names)


@pytest.mark.parametrize("blocks", [(2, 2), (3, 1), (0, 5), (-1, 2), (4, 5)])
def test_range_of_blocks_that_the_model_does_not_have_is_refused(run, tmp_path, blocks):
    with pytest.raises(InputError, match=rf"blocks {blocks[0]}:{blocks[1]} is out of range: the model has blocks 0:4"):
        run(tmp_path / "out", blocks=blocks)
    assert list(tmp_path.iterdir()) == []


# Bad input: nothing is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"salient_ratio": None, "bits": 1.61}, r"bits=1\.61 cannot be reached.*lowest figure to"),
        ({"bits": 2.0}, "set exactly one of the two"),
        ({"salient_ratio": 1.5}, r"salient_ratio=1\.5 is out of range"),
        ({"preset": "papr"}, "unknown preset 'papr' .did you mean 'paper'"),
        (
            {"method": "rtn-w2"},
            "method rtn-w2 has no packed format, it is there to compare with; give ptq161 or mixed",
        ),
        ({"method": "ptq16"}, "unknown method 'ptq16' .did you mean 'ptq161'"),
        ({"epoch": 3}, "unknown setting 'epoch' .did you mean 'epochs'"),
        ({"dtype": "float31"}, "unknown dtype 'float31' .did you mean 'float32'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"samples": 0}, "samples=0"),
        ({"samples": 10**6}, "samples|tokens"),
        ({"calib": "nowhere.txt"}, r"nowhere\.txt"),
        ({"model": Path("no/such/model")}, "no/such/model"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"   \n\n", b"too short", b"\xff\xfe broken \xff"])
def test_bad_calibration_text_is_named(run, tmp_path, content):
    text = tmp_path / "calibration.txt"
    text.write_bytes(content)
    with pytest.raises(InputError, match=r"calibration\.txt") as error:
        run(tmp_path / "out", calib=str(text))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]


def test_folder_that_is_no_model_is_named(run, tmp_path):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(InputError, match="stuff"):
        run(tmp_path / "out", model=tmp_path / "stuff")
    assert [path.name for path in tmp_path.rglob("*")] == ["stuff"]


# Numbers that are not numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_finished_blocks_kept(run, source, tokenizer, tmp_path, bad):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has NaN or infinite") as error:
        run(tmp_path / "out", model=model, tokenizer=tokenizer)
    assert error.value.exit_code == 1
    assert not (tmp_path / "out").exists()
    kept = tmp_path / "out.partial"
    assert [path.name for path in sorted(kept.glob("block-*.safetensors"))] == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    with safe_open(kept / "block-00001.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.up_proj.weight" in file.keys()  # noqa: SIM118


def test_embedding_that_is_not_finite_is_noticed(run, source, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"input of model\.layers\.0\.self_attn\.q_proj is not finite"):
        run(tmp_path / "out", model=model, tokenizer=tokenizer)


def test_loss_that_overflows_is_named_and_finished_blocks_kept(run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"block 0.*lr_scale"):
        run(tmp_path / "out", lr_scale=1e30, lr_angular=1e30)
    assert not (tmp_path / "out").exists()


# The dry run


@pytest.mark.parametrize(
    "changes",
    [{}, {"blocks": (1, 3)}, {"dtype": "bfloat16"}, {"salient_ratio": 0.0, "row_mean": False}, {"salient_ratio": 1.0}],
    ids=str,
)
def test_dry_run_predicts_the_file_and_touches_nothing(run, source, tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    planned = pipeline.plan(source, **SETTINGS | changes)
    assert list(tmp_path.iterdir()) == []
    result = run(tmp_path / "out", **changes)
    for field in ("bits_per_weight", "paper_bits", "quantized_weights", "dense_linears", "file_bytes"):
        assert planned[field] == pytest.approx(result[field], rel=1e-12, abs=0), field
    assert result.keys() <= planned.keys()
    assert (planned["seconds"], planned["peak_rss_bytes"], planned["blocks"]) == (None, None, None)
    assert planned["disk_bytes"] > planned["file_bytes"]
    assert planned["peak_memory_bytes"] > 0
    assert planned["flops"] > 2 * planned["quantized_weights"] * SETTINGS["samples"] * SETTINGS["seqlen"]
    assert json.loads(json.dumps(planned)) == planned


def test_dry_run_refuses_what_the_run_would(source):
    with pytest.raises(InputError, match="cannot be reached"):
        pipeline.plan(source, **SETTINGS | {"salient_ratio": None, "bits": 1.61})


# --head int8


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_int8_head_is_planned_and_written_and_leaves_the_bits_alone(
    run, family, model_folder, calibration_file, tmp_path
):
    model, out = model_folder(family), tmp_path / "int8"
    plain, result = run(tmp_path / "plain", model=model), run(out, model=model, head="int8")
    assert (result["bits_per_weight"], plain["vocabulary_bits"]) == (plain["bits_per_weight"], None)
    assert result["vocabulary_bits"] == 8 + 16 / 32
    matrix = VOCABULARY * 32 + 2 * VOCABULARY
    assert (result["embedding_bytes"], result["head_bytes"]) == (matrix, matrix if family == "llama" else 0)
    planned = pipeline.plan(model, calib=str(calibration_file), **SETTINGS, head="int8")
    for sizes in (planned, inspect(out)):
        assert {key: sizes[key] for key in pipeline.SIZES} == {key: result[key] for key in pipeline.SIZES}
    sizes = inspect(out)
    assert sum(sizes["parts"].values()) + sizes["other_bytes"] + sizes["header_bytes"] == sizes["file_bytes"]
    assert result["file_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert verify(out)["ok"]
    card, record = (out / "README.md").read_text(), json.loads((out / "run.json").read_text())
    assert "Embedding and head, which do not count there, are int8" in card and "8.50 bits per weight" in card
    assert record["config"]["head"] == "int8"
    assert "as they are" in (tmp_path / "plain" / "README.md").read_text()
    linears = [load_file(path / "model.safetensors") for path in (out, tmp_path / "plain")]
    names = [name for name in linears[0] if ".layers." in name]
    assert names and all(linears[0][name].equal(linears[1][name]) for name in names)


def test_int8_head_of_an_unknown_embedding_is_refused_before_anything_is_written(source, tokenizer, run, tmp_path):
    class Normed(torch.nn.Embedding):
        pass

    model = AutoModelForCausalLM.from_pretrained(source)
    model.set_input_embeddings(Normed(VOCABULARY, 32))
    with pytest.raises(UnsupportedModule, match="is Normed"):
        run(tmp_path / "out", model=model, tokenizer=tokenizer, head="int8")
    assert list(tmp_path.iterdir()) == []
