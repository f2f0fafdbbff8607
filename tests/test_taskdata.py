"""Task files: what a line becomes, and what is refused."""

import ast
import json

import pytest
from taskfiles import ROWS, write_task_files

from ptq161.errors import InputError
from ptq161.evaluate.taskdata import TASKS, local_task, read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("task-data"))


def rows(folder, name, split="test"):
    return read_rows(folder, local_task(name))[split]


def test_arc_gets_letters(folder):
    assert rows(folder, "arc_easy")[1] == {
        "question": "What burns?",
        "choices": {"text": ["sand", "water", "salt", "iron", "wood"], "label": ["A", "B", "C", "D", "E"]},
        "answerKey": "E",
    }


def test_winogrande_counts_from_one(folder):
    row = rows(folder, "winogrande", "validation")[0]
    assert row["answer"] == "2" and row["option2"] == "shelf"


def test_hellaswag_is_what_the_harness_joins_again(folder):
    row = rows(folder, "hellaswag", "validation")[0]
    joined = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}".strip()
    assert joined == ROWS["hellaswag_val.jsonl"][0]["query"]
    assert row["label"] == "0"


def test_race_has_one_row_per_article(folder):
    first, second = rows(folder, "race")
    problems = ast.literal_eval(first["problems"])
    assert [problem["answer"] for problem in problems] == ["A", "B"]
    assert problems[1]["options"] == ["cat", "dog", "cow", "hen"]
    assert second["article"] == "It rains." and len(ast.literal_eval(second["problems"])) == 1


def test_mmlu_has_two_splits(folder):
    found = read_rows(folder, local_task("mmlu_anatomy"))
    assert [row["answer"] for row in found["test"]] == [0, 3]
    assert [row["answer"] for row in found["dev"]] == [2]


def test_longbench_without_classes(folder):
    assert rows(folder, "longbench_multi_news")[0]["all_classes"] is None


def test_a_task_without_local_form():
    assert local_task("boolq") is None and local_task("mmlu_anatomy") is TASKS["mmlu"]


GOOD = json.dumps(ROWS["piqa_valid.jsonl"][0])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("piqa", {"goal": None}, "line 2: field 'goal' is null: expected a text"),
        ("piqa", {"label": True}, "line 2: field 'label' is true: expected a whole number"),
        ("piqa", {"label": "1"}, "line 2: field 'label' is \"1\": expected a whole number"),
        ("piqa", {"label": 2}, "line 2 has label 2: expected 0 to 1"),
        ("piqa", {"label": -1}, "line 2 has label -1: expected 0 to 1"),
        ("piqa", {"sol2": ...}, "line 2 has no field 'sol2': expected goal, sol1, sol2, label"),
        ("arc_easy", {"choices": []}, "line 2: field 'choices' is []: expected a list of texts"),
        ("arc_easy", {"choices": ["a", 1]}, "expected a list of texts"),
        ("arc_easy", {"label": 3}, "line 2 has label 3: expected 0 to 2"),
        ("race", {"options": ["a", "b"]}, "line 2 has 2 options to choose from: expected 4"),
        ("mmlu", {"choices": ["a", "b", "c", "d", "e"]}, "line 2 has 5 options to choose from: expected 4"),
        ("winogrande", {"sentence": "No gap."}, "line 2 has no single `_` in its sentence"),
        ("hellaswag", {"query": "no activity"}, "line 2 has no `activity: `"),
        ("lambada_openai", {"text": "word"}, "line 2 has no word before the last one"),
    ],
)
def test_wrong_fields_name_line_and_field(tmp_path, name, change, says):
    task = local_task(name)
    for file in task.files.values():
        good = ROWS[file][0]
        bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
        (tmp_path / file).write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(InputError) as refused:
        read_rows(tmp_path, task)
    assert says in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{GOOD}\n{{", "line 2 is not JSON"),
        (f"\n{GOOD}\n[1]\n", "line 3 is no JSON object"),
        ("\n \n", "has no rows"),
        (b"\xff\xfe", "expected JSON lines in UTF-8"),
    ],
)
def test_malformed_files(tmp_path, content, says):
    (tmp_path / "piqa_valid.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        read_rows(tmp_path, local_task("piqa"))


def test_a_missing_file_is_named_with_what_there_is(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(GOOD)
    with pytest.raises(InputError, match=r"piqa_valid\.jsonl does not exist.* the folder has piqa\.jsonl"):
        read_rows(tmp_path, local_task("piqa"))
