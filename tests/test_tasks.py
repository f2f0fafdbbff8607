"""Tasks through the harness: figures worked out by hand, packed models, settings, refusals."""

import json
import math

import pytest
import torch
from taskfiles import ROWS, write_task_files
from transformers import AutoModelForCausalLM

from ptq161 import cli, load
from ptq161.errors import InputError, NonFiniteError

pytest.importorskip("lm_eval")
tasks = pytest.importorskip("ptq161.evaluate.tasks")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("task-data"))


@pytest.fixture(scope="module")
def model(llama_folder):
    """Its rotary positions never run out; the harness wants room for 256 written tokens."""
    return AutoModelForCausalLM.from_pretrained(llama_folder, max_position_embeddings=1024)


def measure(model, tokenizer, data, names, **settings):
    chosen = tasks.TaskSettings(**settings)
    return tasks.evaluate_tasks(model, tokenizer, tasks.load_tasks(names, data, chosen), chosen)


@torch.no_grad()
def log_likelihood(model, tokenizer, prompt, answer, bos=False):
    """Sum over the answer's tokens; one token is one character here."""
    ids = ([tokenizer.bos_token_id] if bos else []) + tokenizer(prompt + answer)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    first = len(ids) - len(tokenizer(answer)["input_ids"])
    return sum(logits[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize("bos", [False, True])
def test_multiple_choice_by_hand(model, tokenizer, data, bos):
    right = {"acc": 0, "acc_norm": 0}
    for row in ROWS["piqa_valid.jsonl"]:
        prompt = f"Question: {row['goal']}\nAnswer:"
        options = [" " + row["sol1"], " " + row["sol2"]]
        scores = [log_likelihood(model, tokenizer, prompt, option, bos) for option in options]
        per_character = [score / (len(option) - 1) for score, option in zip(scores, options, strict=True)]
        right["acc"] += scores.index(max(scores)) == row["label"]
        right["acc_norm"] += per_character.index(max(per_character)) == row["label"]
    (result,) = measure(model, tokenizer, data, ["piqa"], bos=bos)
    assert result.metrics == {name: count / 4 for name, count in right.items()}
    share = result.metrics["acc"]
    assert result.errors["acc"] == pytest.approx(math.sqrt(share * (1 - share) / 3))
    assert (result.items, result.settings.shots, result.settings.bos) == (4, 0, bos)


def test_last_words_by_hand(model, tokenizer, data):
    parts = [row["text"].rpartition(" ") for row in ROWS["lambada_test_openai.jsonl"]]
    scores = [log_likelihood(model, tokenizer, prompt, f" {word}") for prompt, _, word in parts]
    (result,) = measure(model, tokenizer, data, ["lambada_openai"])
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-sum(scores) / 2), rel=1e-4)
    assert result.errors["perplexity"] > 0


def test_a_packed_model_measures_as_its_dense_weights_do(chat_folder, tokenizer, data):
    names = ["lambada_openai", "arc_easy", "winogrande", "hellaswag", "race"]
    packed = load(chat_folder, mode="packed", activations="float32")
    dense = load(chat_folder, mode="dense")
    first, second = (measure(model, tokenizer, data, names) for model in (packed, dense))
    assert [result.task for result in first] == names
    for one, other in zip(first, second, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
        assert one.items == len(ROWS[next(iter(tasks.local_task(one.task).files.values()))]) - (one.task == "race")


def test_written_answers_and_subjects(model, tokenizer, data):
    subject, written = measure(model, tokenizer, data, ["mmlu_anatomy", "gsm8k"])
    assert (subject.items, written.items, written.settings.shots) == (1, 1, 0)
    assert written.metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    (shown,) = measure(model, tokenizer, data, ["mmlu_anatomy"], shots=1)
    assert shown.settings.shots == 1


def test_limit_and_row(model, tokenizer, data):
    (result,) = measure(model, tokenizer, data, ["piqa"], limit=3, seed=5)
    row = json.loads(json.dumps(result.row()))
    assert row["n"] == row["limit"] == 3 and row["seed"] == 5 and row["data"] == str(data)
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "shots", "bos", "version", "lm_eval"} <= row.keys()


def test_requests_are_counted(model, tokenizer, data):
    seen = []
    loaded = tasks.load_tasks(["arc_easy"], data, tasks.TaskSettings())
    tasks.evaluate_tasks(
        model, tokenizer, loaded, tasks.TaskSettings(), on_request=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 8) for done in range(1, 9)]  # an option each: three and five


@pytest.mark.parametrize(
    ("names", "settings", "says"),
    [
        (["boolq"], {}, "no local data are known for the task 'boolq'"),
        (["arc_challenge"], {}, r"arc_challenge_test\.jsonl does not exist"),
        (["mmlu"], {}, "has no rows with the subject"),
        (["mmlu_anatomi"], {}, "unknown task 'mmlu_anatomi'; near it are: mmlu_anatomy"),
        (["piqa"], {"shots": 2}, "local data of piqa have no examples to show"),
        (["piqa"], {"limit": 0}, "limit=0 is out of range"),
        (["piqa"], {"shots": -1}, "shots=-1 is out of range"),
    ],
)
def test_refusals(model, tokenizer, data, names, settings, says):
    with pytest.raises(InputError, match=says):
        measure(model, tokenizer, data, names, **settings)


def test_without_a_hub_the_local_data_are_named(monkeypatch):
    monkeypatch.setattr(tasks, "hub_reachable", lambda: False)
    with pytest.raises(InputError, match="cannot be reached from here: give --task-data DIR"):
        tasks.load_tasks(["piqa"], None, tasks.TaskSettings())


def test_overflow_is_no_wrong_answer(llama_folder, tokenizer, data):
    broken = AutoModelForCausalLM.from_pretrained(llama_folder)
    broken.lm_head.weight.data[0] = math.inf
    with pytest.raises(NonFiniteError, match="logits overflow"):
        measure(broken, tokenizer, data, ["piqa"])


def test_command(capsys, chat_folder, data, tmp_path):
    out = tmp_path / "results.jsonl"
    words = ["eval", chat_folder, "--tasks", "piqa,arc_easy", "--task-data", data, "--limit", "2", "--device", "cpu"]
    assert cli.main([str(word) for word in [*words, "--json", "--out", out]]) == 0
    found, err = capsys.readouterr()
    result = json.loads(found)
    assert result["perplexity"] is None and result["tasks"].keys() == {"piqa", "arc_easy"}
    assert result["tasks"]["piqa"]["n"] == 2
    assert "tasks: request 12/12" in err and "it/s" not in err
    assert json.loads(out.read_text())["tasks"] == result["tasks"]
    assert cli.main([str(word) for word in [*words, "--quiet"]]) == 0
    found, err = capsys.readouterr()
    assert "acc_norm" in found and "arc_easy" in found and not err


def test_missing_extra_is_one_line(capsys, monkeypatch, data):
    monkeypatch.setattr("ptq161.commands.common.find_spec", lambda name: None)
    assert cli.main(["eval", "M", "--tasks", "piqa", "--task-data", str(data)]) == 2
    assert capsys.readouterr().err == 'ptq161: error: this command needs lm_eval: pip install "ptq161[tasks]"\n'
