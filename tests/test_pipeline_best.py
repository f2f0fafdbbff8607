"""The main job with mixed widths and tuning of the whole model: resuming, refusing, what the file holds."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_text
from families import FAMILIES, VOCABULARY, build
from safetensors.torch import load_file
from test_pipeline import Interruption, assert_same_checkpoint, contents
from transformers import AutoModelForCausalLM

import ptq161
from ptq161 import distill, pipeline, tuning
from ptq161.errors import InputError, NonFiniteError, Ptq161Error
from ptq161.layout import ModelLayout

SETTINGS = {
    "preset": "best",
    "samples": 3,
    "seqlen": 16,
    "bits": 3.0,
    "epochs": 2,
    "distill_tokens": 8 * 32,  # steps of two samples
    "distill_lr_latent": 1e-2,
    "distill_lr_scale": 5e-3,
    "compute": "float32",
    "dtype": "float32",
}
STEPS = 8
BLOCKS = 2


@pytest.fixture(scope="module")
def run(llama_folder, calibration_file):
    """quantize with the settings of this file, some of them changed."""

    def quantize(out, model=llama_folder, **changes):
        return pipeline.quantize(model, out, **{"calib": str(calibration_file), **SETTINGS, **changes})

    return quantize


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run):
    """(result, folder) of an uninterrupted run. Do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run(out), out


@pytest.fixture
def students(monkeypatch):
    """Every student that a run tunes."""
    made, whole = [], tuning.student_of

    def student_of(*args):
        made.append(whole(*args))
        return made[-1]

    monkeypatch.setattr(tuning, "student_of", student_of)
    return made


def interrupt(block, phase, step=None):
    def on_progress(progress):
        if (progress.block, progress.phase) == (block, phase) and step in (None, progress.step):
            raise Interruption

    return on_progress


def layout_in(folder):
    return ModelLayout.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


# What a run gives


def test_result_and_record_say_what_was_done(finished):
    result, out = finished
    assert json.loads(json.dumps(result)) == result
    done = result["distillation"]
    assert done.keys() == {
        *("steps", "tokens", "distinct_tokens", "written_tokens", "fresh"),
        *("held_out_first", "held_out_last", "curve", "kept", "seconds"),
    }
    assert (done["steps"], done["tokens"], done["distinct_tokens"]) == (STEPS, STEPS * 32, 16 * 16)
    assert [point["tokens"] for point in done["curve"]] == list(range(32, 32 * STEPS + 1, 32))
    assert done["curve"][-1]["divergence"] < done["curve"][0]["divergence"]
    assert done["written_tokens"] == 0, "a text that suffices was added to"
    assert done["kept"] and done["held_out_last"] < done["held_out_first"]
    run = json.loads((out / "run.json").read_text())
    assert run["distillation"] == {key: value for key, value in done.items() if key != "seconds"}
    assert run["timing"]["distillation_seconds"] == done["seconds"] > 0
    assert run["config"]["method"] == "mixed" and run["config"]["distill"] == "auto"
    assert all(block["loss_last"] < block["loss_first"] for block in result["blocks"])


def test_bits_stay_within_the_budget(finished):
    result, out = finished
    assert 2.9 < result["bits_per_weight"] <= 3.0
    layout = layout_in(out)
    assert layout.bits_per_weight == result["bits_per_weight"]
    assert {g.width for spec in layout.linears.values() for g in spec.layout.groups} >= {"ternary", "4bit"}
    assert result["paper_bits"] is None


def test_linears_with_one_input_share_their_groups_and_store_the_types_once(run, tmp_path):
    result = run(tmp_path / "out", preset="fast", bits=None, salient_ratio=0.2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    owners = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name, spec in layout_in(tmp_path / "out").linears.items():
        parent, _, leaf = name.rpartition(".")
        owner = f"{parent}.{owners[leaf]}" if leaf in owners else None
        assert spec.columns_from == owner
        assert (f"{name}.column_types" in stored) == (owner is None)
        assert [group.width for group in spec.layout.groups] == ["1bit", "ternary", "4bit"]
    assert 0.15 < result["salient_ratio"] <= 0.2


def test_progress_goes_on_through_the_distillation(run, tmp_path):
    seen = []
    run(tmp_path / "out", on_progress=seen.append)
    phases = [progress.phase for progress in seen]
    assert phases.index("distill") == len(phases) - STEPS
    tuned = seen[-STEPS:]
    assert [(p.block, p.first, p.last, p.step, p.steps) for p in tuned] == [
        (BLOCKS, 0, BLOCKS, step, STEPS) for step in range(1, STEPS + 1)
    ]
    assert all(p.loss > 0 for p in tuned)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_model_stored_in_16_bits_is_tuned_in_either_arithmetic(run, students, llama_folder, tmp_path, compute):
    source = tmp_path / "source"
    shutil.copytree(llama_folder, source)
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(source)
    done = run(tmp_path / "out", source, compute=compute, dtype="auto")["distillation"]
    assert done["kept"] and done["held_out_last"] < done["held_out_first"]
    assert [str(student.dtype) for student in students] == [f"torch.{compute}"]


def test_loaded_model_is_the_student_norms_included(run, students, llama_folder, tmp_path):
    run(tmp_path / "out")
    (student,) = students
    original = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    tokens = torch.randint(4, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        weights = replace(student, dtype=torch.float32).weights()
        expected = torch.func.functional_call(original, weights, (tokens,), {"use_cache": False}).logits
        for mode in ("packed", "dense"):
            found = ptq161.load(tmp_path / "out", mode=mode, activations="float32")(tokens, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, norm in student.norms.items():
        assert stored[name].equal(norm.detach())
        assert not stored[name].equal(original.get_parameter(name)), "the norm was not learned"
    for name, tensor in original.state_dict().items():
        if name not in student.norms and name.rpartition(".")[0] not in student.latents:
            assert stored[name].equal(tensor)


def test_distillation_brings_the_predictions_nearer(finished, run, llama_folder, tmp_path):
    """Measured anew, on text of the same kind that neither run has seen."""
    run(tmp_path / "blocks", distill="off")
    text = make_text(seed=7, words=600)
    tokenizer = pipeline.open_dense(llama_folder)[1]
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)[: 40 * 16].view(40, 16)
    original = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def divergence(folder):
        logs = [model(tokens, use_cache=False).logits.log_softmax(-1) for model in (ptq161.load(folder), original)]
        return torch.nn.functional.kl_div(*(log.flatten(0, 1) for log in logs), log_target=True, reduction="batchmean")

    assert divergence(finished[1]) < 0.98 * divergence(tmp_path / "blocks")


def test_compensated_codes_can_be_tuned(run, tmp_path):
    """Without epochs the blocks hand on latents that round to their codes: tuning starts where they ended."""
    blocks = run(tmp_path / "blocks", epochs=0, distill="off")["blocks"]
    assert all(block["loss_last"] < block["loss_first"] for block in blocks)
    result = run(tmp_path / "tuned", epochs=0)
    assert [block["loss_last"] for block in result["blocks"]] == [block["loss_last"] for block in blocks]
    assert result["distillation"]["held_out_last"] < result["distillation"]["held_out_first"]


def test_fast_is_best_without_the_last_step(run, tmp_path):
    fast = run(tmp_path / "fast", preset="fast")
    off = run(tmp_path / "off", distill="off")
    assert fast["distillation"] is None and off["distillation"] is None
    assert_same_checkpoint(tmp_path / "fast", tmp_path / "off")
    assert not list(tmp_path.glob("*.partial"))


def test_run_that_is_not_kept_leaves_the_blocks_as_they_were(run, tmp_path):
    blocks, tuned = tmp_path / "blocks", tmp_path / "tuned"
    run(blocks, distill="off")
    result = run(tuned, distill_lr_latent=0.0, distill_lr_scale=3.0)
    assert result["distillation"]["kept"] is False
    assert result["distillation"]["held_out_last"] >= result["distillation"]["held_out_first"]
    assert contents(blocks)["model.safetensors"] == contents(tuned)["model.safetensors"]


def test_model_in_memory_is_left_as_it_was(finished, run, llama_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(tmp_path / "out", model=model, tokenizer=tokenizer)
    assert contents(finished[1])["model.safetensors"] == contents(tmp_path / "out")["model.safetensors"]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "opt", "falcon-alibi"])
def test_other_families_from_sixteen_bits(family, run, tokenizer, tmp_path):
    model = build(FAMILIES[family]()).to(torch.bfloat16)
    result = run(tmp_path / "out", model=model, tokenizer=tokenizer, dtype="auto", distill_tokens=64, bits=2.7)
    assert result["distillation"]["steps"] == 2
    tokens = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = {"dtype": torch.float32, "activations": "float32"}
    packed, dense = (ptq161.load(tmp_path / "out", mode=mode, **settings) for mode in ("packed", "dense"))
    with torch.no_grad():
        torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_calibration_samples_themselves_can_be_learned_from(run, tmp_path):
    result = run(tmp_path / "out", distill_fresh=False, samples=9, distill_passes=1, distill_written=False)
    # Nine samples in steps of two, once. None is held out: what is written judges.
    assert result["distillation"]["steps"] == 4
    assert result["distillation"]["distinct_tokens"] == 9 * 16
    assert result["distillation"]["written_tokens"] == 0


def test_what_a_text_is_too_short_for_the_original_writes(run, tmp_path, monkeypatch):
    """And what it is judged by: the blocks know the given samples."""
    texts, write = [], tuning.continuations
    monkeypatch.setattr(
        tuning, "continuations", lambda model, text, *rest: texts.append(text) or write(model, text, *rest)
    )
    phases = []
    changes = {"distill_fresh": False, "samples": 5, "distill_passes": 2}
    result = run(tmp_path / "out", **changes, on_progress=lambda progress: phases.append(progress.phase))
    done = result["distillation"]
    # Of 8 steps of two samples, 8 samples come twice.
    assert (done["written_tokens"], done["distinct_tokens"], done["steps"]) == (3 * 16, 8 * 16, STEPS)
    assert phases.index("write") < phases.index("distill")
    assert [text.shape for text in texts] == [(5, 16)]
    assert run(tmp_path / "more", **changes | {"distill_tokens": 64})["distillation"]["written_tokens"] == 0


def test_written_text_is_not_written_again(run, tmp_path, monkeypatch):
    changes = {"distill_fresh": False, "samples": 5, "distill_passes": 2}
    run(tmp_path / "whole", **changes)
    with pytest.raises(Interruption):
        run(tmp_path / "out", **changes, on_progress=interrupt(BLOCKS, "distill", 3))
    monkeypatch.setattr(tuning, "continuations", None)
    run(tmp_path / "out", **changes)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "whole")


def test_some_blocks_only(run, tmp_path, students):
    run(tmp_path / "out", blocks=(1, 2), bits=2.7)
    assert {name.split(".")[2] for name in students[0].latents} == {"1"}
    assert ptq161.load(tmp_path / "out")


# Interrupted and continued


@pytest.mark.parametrize(
    ("block", "phase", "step"), [(0, "learn", 2), (1, "targets", None), (1, "save", None), (BLOCKS, "distill", 1)]
)
def test_interrupted_run_continues_to_the_same_bytes(finished, run, tmp_path, block, phase, step):
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        run(out, on_progress=interrupt(block, phase, step))
    assert not out.exists()
    seen = []
    run(out, on_progress=seen.append)
    assert {progress.block for progress in seen} == set(range(block, BLOCKS + 1)), "a finished block was done again"
    assert_same_checkpoint(finished[1], out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "work was left behind"


def test_interrupted_distillation_continues_where_it_was_saved(finished, run, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "SECONDS_BETWEEN_SAVES", 0.0)
    out = tmp_path / "out"
    for step in (3, 6):
        with pytest.raises(Interruption):
            run(out, on_progress=interrupt(BLOCKS, "distill", step))
    seen = []
    result = run(out, on_progress=seen.append)
    assert [progress.step for progress in seen] == [6, 7, 8]
    assert_same_checkpoint(finished[1], out)
    assert result["distillation"]["held_out_first"] == finished[0]["distillation"]["held_out_first"]


def test_failure_while_writing_the_result_keeps_the_distillation(finished, run, tmp_path, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_packed", disk_full)
        with pytest.raises(Ptq161Error, match="finished blocks are kept"):
            run(tmp_path / "out")
    seen = []
    run(tmp_path / "out", on_progress=seen.append)
    assert seen == [], "finished work was done again"
    assert_same_checkpoint(finished[1], tmp_path / "out")


def test_other_distillation_does_not_continue_a_run(run, tmp_path):
    with pytest.raises(Interruption):
        run(tmp_path / "out", on_progress=interrupt(BLOCKS, "distill", 2))
    with pytest.raises(InputError, match=r"other settings \(.*distill_passes.*--restart"):
        run(tmp_path / "out", distill_passes=7)
    with pytest.raises(InputError, match=r"other settings \(.*calibration"):
        run(tmp_path / "out", distill_tokens=6 * 32)


# Where it does not fit


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: 1000)


def test_too_little_memory_is_said_where_it_is_not_required(run, tmp_path, little_memory):
    result = run(tmp_path / "out")
    assert result["distillation"].keys() == {"skipped"}
    assert result["distillation"]["skipped"].startswith("needs about ")
    assert "free" not in result["distillation"]["skipped"], "what is free differs between equal runs"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["distillation"] == result["distillation"]
    assert record["timing"]["distillation_seconds"] is None
    run(tmp_path / "blocks", distill="off")
    assert contents(tmp_path / "out")["model.safetensors"] == contents(tmp_path / "blocks")["model.safetensors"]


def test_too_little_memory_is_refused_where_it_is_required(run, tmp_path, little_memory):
    with pytest.raises(InputError, match=r"distillation needs about .* GB more memory, 0\.0 GB are free") as error:
        run(tmp_path / "out", distill="required")
    assert "\n" not in str(error.value) and "distill=auto" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_went_while_it_ran_keeps_the_blocks(run, finished, tmp_path, monkeypatch):
    looks = iter([10**12, 1000])
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "free_memory_bytes", lambda device: next(looks))
        with pytest.raises(Ptq161Error, match="finished blocks are kept, the same command continues") as error:
            run(tmp_path / "out", distill="required")
    assert error.value.exit_code == 1 and "\n" not in str(error.value)
    seen = []
    run(tmp_path / "out", distill="required", on_progress=seen.append)
    assert {progress.phase for progress in seen} == {"distill"}
    weights = "model.safetensors"
    assert contents(tmp_path / "out")[weights] == contents(finished[1])[weights]


def test_blocks_are_computed_again_where_memory_is_short(run, finished, tmp_path, monkeypatch, students):
    """The same model to the last bit, whatever was free."""
    monkeypatch.setattr(tuning, "needed_bytes", lambda *args, recomputed=False: 50 if recomputed else 150)
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: 100)
    run(tmp_path / "out", distill="required")
    assert students[0].recomputed == ("model.layers.0", "model.layers.1")
    weights = "model.safetensors"
    assert contents(tmp_path / "out")[weights] == contents(finished[1])[weights]


def test_memory_that_cannot_be_known_is_no_obstacle(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "free_memory_bytes", lambda device: None)
    assert run(tmp_path / "out", distill="required", distill_tokens=64)["distillation"]["steps"] == 2


def test_distillation_that_diverges_names_the_step_and_keeps_the_blocks(run, tmp_path):
    with pytest.raises(NonFiniteError, match="distillation diverged at step"):
        run(tmp_path / "out", distill_lr_scale=1e30)
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == BLOCKS


# Refused before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ptq161", "distill": "required"}, r"distill=required with method=ptq161: .*--set distill=off"),
        ({"preset": "paper", "distill": "required"}, r"distill=required with method=ptq161"),
        ({"distill_tokens": 31, "distill": "required"}, r"needs 2 samples besides.* and distill_tokens=31; .*=auto"),
        (
            {"distill_fresh": False, "distill_written": False, "samples": 1, "distill": "required"},
            r"there are 1 of 16 tokens",
        ),
        ({"bits": 1.3}, r"bits=1\.3 cannot be reached.*lowest figure to"),
        ({"distill_token": 5}, r"unknown setting 'distill_token' .did you mean 'distill_tokens'"),
        ({"distill": "no"}, "setting distill='no': expected off or auto or required"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        run(tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "ptq161"}, "needs codes that are learned, and those of method ptq161 are not"),
        ({"distill_tokens": 31}, "distill_tokens=31"),
        ({"distill_fresh": False, "samples": 1, "distill_written": False}, "there are 1 of 16 tokens"),
    ],
    ids=str,
)
def test_what_distillation_lacks_is_said_and_the_blocks_stay(run, tmp_path, changes, reason):
    result = run(tmp_path / "out", **changes)
    assert reason in result["distillation"]["skipped"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["distillation"] == result["distillation"]


def test_text_without_a_fresh_window_is_learned_from_again(run, tmp_path, tmp_path_factory):
    text = tmp_path_factory.mktemp("short") / "text.txt"
    text.write_text(make_text(0, 60)[: 3 * 16], encoding="utf-8")
    record = run(tmp_path / "out", calib=str(text))["distillation"]
    assert record["fresh"] is False and record["distinct_tokens"] == 3 * 16


# The dry run


def test_dry_run_counts_what_distillation_takes(llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_it, without = (pipeline.plan(llama_folder, **SETTINGS | {"distill": d}) for d in ("auto", "off"))
    assert list(tmp_path.iterdir()) == []
    assert with_it["distillation"] is None and json.loads(json.dumps(with_it)) == with_it
    weights = with_it["quantized_weights"]
    assert with_it["disk_bytes"] - without["disk_bytes"] == 4 * 7 * weights  # latents; old and new state of three each
    assert with_it["flops"] - without["flops"] == 2 * weights * 4 * SETTINGS["distill_tokens"]
    assert with_it["peak_memory_bytes"] >= without["peak_memory_bytes"]
    assert 2.8 < with_it["bits_per_weight"] <= SETTINGS["bits"]


@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"bits": None, "salient_ratio": 0.2}], ids=str)
def test_dry_run_is_exact_where_nothing_is_measured(run, llama_folder, tmp_path, changes):
    changes = {"preset": "fast", "epochs": 0} | changes
    planned = pipeline.plan(llama_folder, **SETTINGS | changes)
    result = run(tmp_path / "out", **changes)
    for field in ("bits_per_weight", "paper_bits", "quantized_weights", "dense_linears", "file_bytes"):
        assert planned[field] == result[field], field


def test_measured_widths_differ_from_uniform_ones(run, tmp_path):
    for allocation in ("fisher", "uniform"):
        run(tmp_path / allocation, preset="fast", epochs=0, allocation=allocation)
    led, uniform = (layout_in(tmp_path / allocation) for allocation in ("fisher", "uniform"))
    assert led != uniform
    # Uniform: the same in both blocks, but for one step.
    sizes = [
        [spec.layout for name, spec in uniform.linears.items() if name.startswith(f"model.layers.{index}.")]
        for index in range(BLOCKS)
    ]
    assert sum(one != other for one, other in zip(*sizes, strict=True)) <= 3
