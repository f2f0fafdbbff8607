"""Comparisons: every method on the same ground, one honest row each, continued after whatever stopped them."""

import hashlib
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from honest_bits import block_bits, llamacpp_bits, packed_bits
from transformers import AutoModelForCausalLM

from ptq161 import arguments, autoround, cli, contenders, llamacpp, options, tables, terminal
from ptq161.compare import compare, read_rows
from ptq161.comparison_inputs import RESULTS, Settings
from ptq161.config import PRESETS, CalibrationConfig
from ptq161.contenders import FULL_PRECISION, contender
from ptq161.data import calibration_tokens, evaluation_tokens
from ptq161.errors import InputError
from ptq161.evaluate.drift import block_errors, block_outputs
from ptq161.evaluate.perplexity import perplexity
from ptq161.hf import load
from ptq161.linear import PackedLinear
from ptq161.llamacpp import LIBRARIES
from ptq161.meters import CompareMeter
from ptq161.methods import BASELINES
from ptq161.methods.rtn import RoundToNearest
from ptq161.sources import open_dense, open_model

PAPER = "paper:epochs=1:salient_ratio=0.25"
FAST = "fast:epochs=1:bits=3"
SOON = {"omniquant": ":epochs=1", "owq": ":steps=4:choosing_steps=4"}  # less searching, as many bits
ALL = (PAPER, FAST, *(name + SOON.get(name.partition("-")[0], "") for name in BASELINES))
# Rows and columns of the linears of the tiny Llama's blocks, by the input that they share.
TINY = {
    0: [(32, 32), (16, 32), (16, 32)],
    1: [(32, 32)],
    2: [(48, 32), (48, 32)],
    3: [(32, 48)],
}
SMOLLM2 = {
    0: [(576, 576), (192, 576), (192, 576)],
    1: [(576, 576)],
    2: [(1536, 576), (1536, 576)],
    3: [(576, 1536)],
}


@pytest.fixture
def settings(calibration_file, evaluation_file):
    return Settings(
        methods=("rtn-w2g128", "gptq-w2"),
        calibration=CalibrationConfig((str(calibration_file),), samples=3, seqlen=24),
        ppl=(str(evaluation_file),),
        window=32,
        max_windows=3,
        tasks=None,
        preprocessed=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory, llama_folder, calibration_file, evaluation_file):
    """(rows, folder) of one comparison of every method. Do not write into it."""
    out = tmp_path_factory.mktemp("compare") / "out"
    words = ["--calib", calibration_file, "--ppl", evaluation_file, "--methods", ",".join(ALL), "--device", "cpu"]
    sizes = ["--samples", 3, "--seqlen", 24, "--window", 32, "--max-windows", 3, "--dtype", "float32", "--quiet"]
    assert cli.main([str(word) for word in ["compare", llama_folder, "--out", out, *words, *sizes]]) == 0
    return {row["method"]: row for row in read_rows(out)}, out


class Stopped(Exception):
    """Ends a comparison from within."""


def stop_at(label):
    def step(row, what, done, total):
        if row == label:
            raise Stopped

    return step


# Rows


def test_every_method_has_its_row_and_full_precision_comes_first(everything):
    rows, _ = everything
    assert list(rows) == [FULL_PRECISION, *ALL]
    assert {row["status"] for row in rows.values()} == {"ok"}, [row["reason"] for row in rows.values()]


def test_rows_keep_the_contract(everything):
    contract = (
        "schema model revision method preprocessing config calib bits_per_weight claimed_bits file_bytes perplexity "
        "tasks seconds peak_rss_bytes seed threads version command status reason"
    )
    for name, row in everything[0].items():
        assert set(contract.split()) <= row.keys(), name
        assert next(iter(row["perplexity"].values()))["tokens"] == 3 * 31
        assert row["command"].startswith("ptq161 compare ") and list(row["calib"].values()) == [72]
        assert len(row["block_errors"]) == 2
        if name != FULL_PRECISION:
            assert row["seconds"] > 0 and row["claimed_bits"] > 0 and row["config"]
            assert [block["index"] for block in row["blocks"]] == [0, 1]


def test_full_precision_is_the_model_itself(everything, llama_folder, evaluation_file):
    row = everything[0][FULL_PRECISION]
    model, tokenizer = open_model(llama_folder)
    expected = perplexity(model, evaluation_tokens(str(evaluation_file), tokenizer), 32, max_windows=3)
    assert row["perplexity"] == {str(evaluation_file): expected}
    assert row["block_errors"] == [0.0, 0.0]
    assert row["bits_per_weight"] is None and row["seconds"] is None


def test_quantized_rows_are_measured_on_what_was_made(everything, evaluation_file):
    """The packed checkpoint in the folder has the perplexity and the settings of its row."""
    rows, out = everything
    folder = out / "models" / "original" / PAPER.replace(":", ",")
    model, tokenizer = open_model(folder, mode="dense", dtype=torch.float32)
    expected = perplexity(model, evaluation_tokens(str(evaluation_file), tokenizer), 32, max_windows=3)
    assert rows[PAPER]["perplexity"][str(evaluation_file)]["ppl"] == pytest.approx(expected["ppl"], rel=1e-6)
    assert rows[PAPER]["config"]["epochs"] == 1 and rows[FAST]["config"]["bits"] == 3
    assert rows["omniquant-w2g64:epochs=1"]["config"] == {"bits": 2, "group": 64, "epochs": 1, "lr": 0.01}
    ppl = {name: row["perplexity"][str(evaluation_file)]["ppl"] for name, row in rows.items()}
    assert len(set(ppl.values())) > 12, "every method made another model"


def test_more_bits_are_nearer_to_the_original(everything):
    errors = {name: row["block_errors"][-1] for name, row in everything[0].items()}
    assert 0 < errors["gptq-w4g128"] < errors["gptq-w3g128"] < errors["gptq-w2g128"]


# Bits


@pytest.mark.parametrize("method", ALL)
def test_bits_follow_from_the_shapes(everything, method):
    row = everything[0][method]
    check_bits(row, TINY, blocks=2)


def check_bits(row, shapes, blocks):
    """Recompute the bits of a row from nothing but the shapes of the linears (and how channels were divided)."""
    weights = blocks * sum(rows * cols for shared in shapes.values() for rows, cols in shared)
    assert row["quantized_weights"] == weights
    assert row["bits_per_weight"] == sum(row["bits_by_part"].values()) / weights
    if row["method"].startswith("llamacpp:"):
        kind, widths = row["method"].partition(":")[2], row["config"]["padded_widths"]
        assert sum(row["bits_by_part"].values()) == llamacpp_bits(kind, widths, blocks)
        assert {2 * widths["hidden"], widths["inner"]} <= {1536}, "those of SmolLM2"
        return
    if row["layers"] is None:
        bits, expected = sum(row["bits_by_part"].values()), blocks * block_bits(row["method"], shapes)
        if row["method"] == "pb-llm":  # weights as salient as the first that gets one bit instead of eight get one, too
            tied, odd = divmod(expected - bits, 8 - 1)
            assert odd == 0 and 0 <= tied < 1e-6 * weights
        else:
            assert bits == expected
        return
    assert sum(layer["linears"] * layer["rows"] * layer["cols"] for layer in row["layers"]) == weights
    paper, parts = row["config"]["method"] == "ptq161", dict(row["bits_by_part"])
    columns = parts.pop("columns")
    assert sum(parts.values()) == packed_bits(row["layers"], paper=paper)
    kinds = max(len(layer["columns"]) for layer in row["layers"])
    every = 8 * blocks * sum(-(-shared[0][1] * (kinds - 1).bit_length() // 8) for shared in shapes.values())
    assert columns == every if paper else 0 < columns <= every  # a linear of one width stores none


STORIES = {0: [(64, 64), (32, 64), (32, 64)], 1: [(64, 64)], 2: [(172, 64), (172, 64)], 3: [(64, 172)]}
COMMITTED = {  # file -> shapes and number of the model's blocks
    "compare-quick-smollm2-135m.jsonl": (SMOLLM2, 30),
    "compare-smollm2-135m.jsonl": (SMOLLM2, 30),
    "compare-stories260k.jsonl": (STORIES, 5),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_have_the_bits_that_their_shapes_give(name):
    lines = (REPOSITORY / "benchmarks" / "results" / name).read_text().splitlines()
    first, *rows = map(json.loads, lines)
    assert (first["method"], first["status"]) == (FULL_PRECISION, "ok") and rows
    for row in rows:
        if row["method"] == FULL_PRECISION:  # of a preprocessed model
            assert row["preprocessing"] and row["bits_per_weight"] is None
        else:
            check_bits(row, *COMMITTED[name])


# One ground for all


def test_all_methods_calibrate_on_the_same_tokens(tmp_path, settings, llama_folder, calibration_file, monkeypatch):
    seen = []

    class Seeing(RoundToNearest):
        def __call__(self, task, generator):
            seen.append((task.index, task.inputs.clone(), generator.initial_seed()))
            return super().__call__(task, generator)

    monkeypatch.setitem(BASELINES, "seeing", Seeing(2, None))
    monkeypatch.setitem(BASELINES, "also-seeing", Seeing(2, None))
    compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("seeing", "also-seeing")))
    first, again = seen[:2], seen[2:]
    assert all(one[1].equal(other[1]) and one[2] == other[2] for one, other in zip(first, again, strict=True))
    model, tokenizer = open_model(llama_folder)
    samples = calibration_tokens(settings.calibration, tokenizer, model)
    torch.testing.assert_close(first[0][1], model.get_input_embeddings()(samples).float())


def test_packed_models_calibrate_on_those_tokens_too(everything, llama_folder, calibration_file):
    """Its run.json names the text, the samples and the seed that the comparison's own tokens are drawn by."""
    run = json.loads((everything[1] / "models" / "original" / FAST.replace(":", ",") / "run.json").read_text())
    assert run["calibration"] == {
        "sources": [str(calibration_file)],
        "samples": 3,
        "seqlen": 24,
        "seed": 0,
        "tokens": 72,
    }


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def test_the_model_is_left_as_it_is(tmp_path, settings, llama_folder, tokenizer):
    """Weights are mapped from its files, and methods write into theirs."""
    before = checksums(llama_folder)
    subject = contenders.Subject(
        path=str(llama_folder),
        preprocessing=None,
        dense=open_dense(llama_folder)[0],
        tokenizer=tokenizer,
        calibration=settings.calibration,
        samples=torch.arange(48).view(2, 24),
        device=settings.device,
        dtype=settings.dtype,
        folder=tmp_path,
    )
    weights = {name: tensor.clone() for name, tensor in subject.dense.weights.items()}
    contender("rtn-w2")(subject, lambda what, done, total: None)
    assert all(subject.dense.weights[name].equal(weight) for name, weight in weights.items())
    assert checksums(llama_folder) == before


def test_a_model_held_in_memory_is_copied(tmp_path, settings, llama_folder):
    """As a GGUF is, or a .bin."""
    folder = tmp_path / "pickled"
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama_folder / name).read_bytes())
    compare(str(folder), tmp_path / "out", settings)
    compare(str(llama_folder), tmp_path / "other", settings)
    measured = [[row["perplexity"] for row in read_rows(tmp_path / out)] for out in ("out", "other")]
    assert measured[0] == measured[1] and measured[0][1] != measured[0][2]


def test_preprocessed_models_get_rows_of_their_own(tmp_path, settings, llama_folder, model_folder):
    """Here another random model stands for it."""
    other = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    other.save_pretrained(tmp_path / "restored")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "restored" / name).write_bytes((llama_folder / name).read_bytes())
    restored = str(tmp_path / "restored")
    settings = replace(settings, methods=("rtn-w2", PAPER))
    compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("rtn-w2",)))  # it may come later
    compare(str(llama_folder), tmp_path / "out", replace(settings, preprocessed=restored))
    rows = compare(str(llama_folder), tmp_path / "out", settings)["rows"]
    with pytest.raises(InputError, match="preprocessed: "):
        compare(str(llama_folder), tmp_path / "out", replace(settings, preprocessed=str(model_folder("llama-tied"))))
    assert {(row["method"], row["preprocessing"]) for row in rows} == {
        (name, preprocessing) for name in (FULL_PRECISION, "rtn-w2", PAPER) for preprocessing in (None, restored)
    }
    ppl = [row["perplexity"][settings.ppl[0]]["ppl"] for row in rows]
    assert len(set(ppl)) == len(rows) == 6
    (own,) = (row for row in rows if (row["method"], row["preprocessing"]) == (FULL_PRECISION, restored))
    assert own["block_errors"][0] > 0, "against the original, not itself"


def test_self_and_preprocessed_do_not_go_together(tmp_path, settings, llama_folder):
    both = replace(settings, calibration=CalibrationConfig(("self",), 2, 24), preprocessed=str(llama_folder))
    with pytest.raises(InputError, match="sample another text"):
        compare(str(llama_folder), tmp_path / "out", both)


def test_tasks_are_measured_on_every_row(tmp_path, settings, llama_folder):
    def measure(model, tokenizer, on_request):
        on_request(1, 1)
        return {"piqa": {"acc": float(model.get_input_embeddings().weight.numel() == len(tokenizer) * 32), "n": 1}}

    steps = []
    settings = replace(settings, methods=("rtn-w2",), tasks={"names": ["piqa"], "limit": 1})
    rows = compare(
        str(llama_folder), tmp_path / "out", settings, measure_tasks=measure, on_step=lambda *step: steps.append(step)
    )["rows"]
    assert [row["tasks"] for row in rows] == [{"piqa": {"acc": 1.0, "n": 1}}] * 2
    assert ("rtn-w2", "request", 1, 1) in steps
    with pytest.raises(InputError, match=r"tasks\.limit: 1 -> 2"):
        compare(str(llama_folder), tmp_path / "out", replace(settings, tasks={"names": ["piqa"], "limit": 2}))


# Trouble


@pytest.mark.skipif(not any(map(find_spec, LIBRARIES)), reason="no llama.cpp is installed")
def test_llamacpp_is_padded_and_says_so(tmp_path, settings, llama_folder, capsys):
    result = compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("llamacpp:Q2_K",)))
    row = result["rows"][1]
    assert row["status"] == "ok" and row["bits_by_part"].keys() == {"codes", "padding"}
    assert row["claimed_bits"] < 3.5 < row["bits_per_weight"]
    assert row["file_bytes"] == next((tmp_path / "out").rglob("llamacpp,Q2_K.gguf")).stat().st_size
    tables.show_compared(terminal.console(), result)
    assert "llamacpp:Q2_K is padded" in capsys.readouterr().out


def test_without_llamacpp_its_row_is_skipped(tmp_path, settings, llama_folder, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    rows = compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("llamacpp:IQ1_S",)))["rows"]
    assert rows[1]["status"] == "skipped" and 'pip install "ptq161[llamacpp]"' in rows[1]["reason"]


def test_without_autoround_its_row_is_skipped(tmp_path, settings, llama_folder, monkeypatch):
    monkeypatch.setattr(autoround, "find_spec", lambda name: None)
    rows = compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("autoround",)))["rows"]
    assert rows[1]["status"] == "skipped" and 'pip install "ptq161[autoround]"' in rows[1]["reason"]


def test_a_method_that_cannot_take_the_model_says_why_and_the_others_go_on(tmp_path, settings, llama_folder):
    """So few weights have no room for 1.61 bits."""
    rows = compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("paper", "rtn-w2")))["rows"]
    assert [row["status"] for row in rows] == ["ok", "skipped", "ok"]
    assert "lowest" in rows[1]["reason"] and "\n" not in rows[1]["reason"]
    assert rows[1]["perplexity"] is None and rows[1]["bits_per_weight"] is None
    assert not list((tmp_path / "out").rglob("*.partial"))


class Broken(RoundToNearest):
    """Fails where a library would."""

    def __call__(self, task, generator):
        torch.linalg.cholesky(-torch.eye(2))


def test_a_method_that_fails_says_why_and_is_tried_again(tmp_path, settings, llama_folder, monkeypatch):
    monkeypatch.setitem(BASELINES, "rtn-w2", Broken(2, None))
    settings = replace(settings, methods=("rtn-w2", "rtn-w2g128"))
    rows = compare(str(llama_folder), tmp_path / "out", settings)["rows"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "cholesky" in rows[1]["reason"]
    monkeypatch.undo()
    again = compare(str(llama_folder), tmp_path / "out", settings)["rows"]
    assert [(row["method"], row["status"]) for row in again] == [
        (FULL_PRECISION, "ok"),
        ("rtn-w2g128", "ok"),
        ("rtn-w2", "ok"),
    ]


def test_a_row_that_cannot_be_measured_keeps_its_bits(tmp_path, settings, llama_folder, monkeypatch):
    class Overflowing(RoundToNearest):
        def __call__(self, task, generator):
            results = super().__call__(task, generator)
            return {name: replace(result, weight=result.weight * 1e30) for name, result in results.items()}

    monkeypatch.setitem(BASELINES, "rtn-w2", Overflowing(2, None))
    row = compare(str(llama_folder), tmp_path / "out", replace(settings, methods=("rtn-w2",)))["rows"][1]
    assert row["status"] == "failed" and row["perplexity"] is None and row["block_errors"] == [None, None]
    assert row["bits_per_weight"] == pytest.approx(2.5, abs=0.2)


def test_text_too_short_for_a_window_ends_the_comparison(tmp_path, settings, llama_folder):
    with pytest.raises(InputError, match="less than one window"):
        compare(str(llama_folder), tmp_path / "out", replace(settings, window=100_000))
    assert read_rows(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtn-w3", "did you mean 'rtn-w2'"),
        ("paper:epoch=4", "did you mean 'epochs'"),
        ("paper:epochs", "METHOD:SETTING=VALUE"),
        ("gptq-w2:bits=two", "expected int"),
        ("gptq-w2:calibrates_on=full", "unknown setting"),
        ("paper:bits=99", "out of range"),
        ("llamacpp:IQ1", "did you mean 'IQ1_"),
        ("llamacpp", "unknown llama.cpp type ''"),
    ],
)
def test_methods_that_there_are_not(name, message):
    with pytest.raises(InputError, match=message):
        contender(name)


# Again and again


def test_a_stopped_comparison_continues(tmp_path, settings, llama_folder):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        compare(str(llama_folder), out, settings, on_step=stop_at("gptq-w2"))
    before = (out / RESULTS).read_text()
    assert len(before.splitlines()) == 2
    compare(str(llama_folder), out, settings)
    assert (out / RESULTS).read_text().startswith(before)
    done = (out / RESULTS).read_text()
    compare(str(llama_folder), out, replace(settings, methods=("rtn-w2", *settings.methods)))
    assert (out / RESULTS).read_text().startswith(done)
    assert [row["method"] for row in read_rows(out)][3:] == ["rtn-w2"]


def test_a_packed_model_stopped_halfway_continues_and_has_no_time(tmp_path, settings, llama_folder):
    out, settings = tmp_path / "out", replace(settings, methods=(PAPER,))

    def step(row, what, done, total):
        if row == PAPER and what == "save":
            raise Stopped

    with pytest.raises(Stopped):
        compare(str(llama_folder), out, settings, on_step=step)
    row = compare(str(llama_folder), out, settings)["rows"][1]
    assert row["status"] == "ok" and row["seconds"] is None
    straight = compare(str(llama_folder), tmp_path / "straight", settings)["rows"][1]
    assert row["perplexity"] == straight["perplexity"] and straight["seconds"] > 0


def test_other_ground_is_refused_by_name(tmp_path, settings, llama_folder, model_folder, calibration_file):
    out = tmp_path / "out"
    compare(str(llama_folder), out, replace(settings, methods=()))
    calibration = settings.calibration
    for other, differing in {
        "seed": (replace(settings, calibration=replace(calibration, seed=1)), "calibration.seed: 0 -> 1"),
        "window": (replace(settings, window=16), "window: 32 -> 16"),
        "text": (replace(settings, ppl=(str(calibration_file),)), f"evaluation.{calibration_file}: None -> "),
    }.values():
        with pytest.raises(InputError, match="--restart") as refused:
            compare(str(llama_folder), out, other)
        assert differing in str(refused.value)
    with pytest.raises(InputError, match="model: '"):
        compare(str(model_folder("llama-tied")), out, settings)
    assert [row["method"] for row in read_rows(out)] == [FULL_PRECISION]
    rows = compare(str(llama_folder), out, replace(settings, window=16, methods=()), restart=True)["rows"]
    assert [row["perplexity"][settings.ppl[0]]["seqlen"] for row in rows] == [16]


def test_foreign_folders_are_left_alone(tmp_path, settings, llama_folder):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no folder of a comparison"):
        compare(str(llama_folder), tmp_path, settings, restart=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="expected a folder"):
        compare(str(llama_folder), tmp_path / "thesis.txt", settings)


# The drift of hidden states


def test_block_outputs_are_the_hidden_states(llama_folder):
    model, _ = open_model(llama_folder)
    tokens = torch.arange(20)
    with torch.no_grad():
        states = model(tokens[None], output_hidden_states=True).hidden_states
    hooks = [len(block._forward_hooks) for block in model.model.layers]
    outputs = block_outputs(model, tokens)
    assert [len(block._forward_hooks) for block in model.model.layers] == hooks
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], states[1])
    assert block_errors(model, tokens, [2 * outputs[0], outputs[1]]) == [pytest.approx(0.25), 0.0]


# The command


def test_quick_methods_and_defaults_are_there():
    assert set(options.BASELINES) == BASELINES.keys()
    for settings in (options.QUICK, options.FULL):
        for name in settings["methods"]:
            contender(name)
    assert {name.partition(":")[0] for name in options.FULL["methods"]} == PRESETS.keys() | BASELINES.keys()


def parsed(*words):
    return options.compare_settings(arguments.parse(["compare", "M", *words, "--calib", "a.txt", "--ppl", "b.txt"]))


def test_without_a_terminal_there_is_a_line_for_every_tenth(capsys):
    meter = CompareMeter(quiet=False)
    for row, what in (("gptq-w2", "block"), ("gptq-w2", "window"), ("billm", "window")):
        for done in range(1, 31):
            meter(row, what, done, 30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 * 11
    assert lines[:2] == ["gptq-w2: block 1/30", "gptq-w2: block 3/30"]
    assert lines[-1] == "billm: window 30/30"


def test_options_go_over_quick_over_the_full_ones():
    full, quick = parsed("--out", "o"), parsed("--out", "o", "--quick")
    assert (full["calibration"].seqlen, full["window"], full["max_windows"]) == (2048, 2048, None)
    assert (quick["calibration"].seqlen, quick["window"]) == (256, 512)
    assert parsed("--out", "o", "--quick", "--max-windows", "3", "--methods", "rtn-w2,fast:epochs=1") == quick | {
        "max_windows": 3,
        "methods": ("rtn-w2", "fast:epochs=1"),
    }
    assert parsed("o", "--seqlen", "64")["window"] == 64
    assert full["tasks"] is None
    words = ("--tasks", "piqa,arc_easy", "--limit", "300", "--task-data", "d")
    assert parsed("o", *words)["tasks"] == {"names": ["piqa", "arc_easy"], "data": "d", "limit": 300, "shots": None}


def test_the_command_refuses_what_makes_no_sense(capsys):
    for words, message in (
        ([], "--out DIR"),
        (["--out", "o", "--methods", "rtn-w2,rtn-w2"], "twice"),
        (["--out", "o", "--samples", "0"], "samples=0"),
    ):
        with pytest.raises(InputError, match=message):
            parsed(*words)


def test_the_command_prints_a_table(everything, capsys, llama_folder, calibration_file, evaluation_file):
    rows, _ = everything
    words = rows[FULL_PRECISION]["command"].split()[1:]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in rows) and "ptq161 report" in text
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == list(rows.values())


def test_packed_models_of_a_comparison_can_be_used(everything):
    model = load(everything[1] / "models" / "original" / FAST.replace(":", ","), mode="packed")
    assert any(isinstance(module, PackedLinear) for module in model.modules())
