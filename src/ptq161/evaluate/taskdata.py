"""Task data from local files: JSON lines in, rows shaped like those of the hub's data sets out.

The harness' own definitions then make prompts and metrics of them. docs/tasks.md lists the files and their fields.
"""

import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ptq161.errors import InputError

Row = dict[str, Any]
_EXPECTED = {str: "a text", int: "a whole number", list: "a list of texts"}


def _as_it_is(row: Row) -> Row:
    return row


def _fitting(row: Row) -> None:
    return None


@dataclass(frozen=True)
class LocalTask:
    """Where a task's rows lie and what they must be.

    folder: the harness' folder with the task's definition. files: split of that definition -> file.
    fields: name -> str, int, or list (of texts); others are ignored. problem: what else is wrong with a row, or None.
    row: one line of the file as a row of the hub's data set. rows: what happens to all of them before that.
    """

    folder: str
    files: Mapping[str, str]
    fields: Mapping[str, type]
    problem: Callable[[Row], str | None] = _fitting
    row: Callable[[Row], Row] = _as_it_is
    rows: Callable[[list[Row]], list[Row]] = list


def _label_among(options: Callable[[Row], Sequence[str]], count: int | None = None) -> Callable[[Row], str | None]:
    """A check that `label` is the index of one of a row's options, of which there are `count` where that is given."""

    def problem(row: Row) -> str | None:
        have = len(options(row))
        if have != (have if count is None else count):
            return f"has {have} options to choose from: expected {count}"
        return None if 0 <= row["label"] < have else f"has label {row['label']}: expected 0 to {have - 1}"

    return problem


def _arc(row: Row) -> Row:
    letters = list(string.ascii_uppercase[: len(row["choices"])])
    choices = {"text": row["choices"], "label": letters}
    return {"question": row["question"], "choices": choices, "answerKey": letters[row["label"]]}


def _winogrande_problem(row: Row) -> str | None:
    if row["sentence"].count("_") != 1:
        return "has no single `_` in its sentence, where the options go"
    return _label_among(lambda row: [row["option1"], row["option2"]])(row)


def _winogrande(row: Row) -> Row:
    return {key: row[key] for key in ("sentence", "option1", "option2")} | {"answer": str(row["label"] + 1)}


def _hellaswag_problem(row: Row) -> str | None:
    if ": " not in row["query"]:
        return "has no `activity: ` at the start of its query"
    return _label_among(lambda row: row["endings"])(row)


def _hellaswag(row: Row) -> Row:
    # The harness joins these three again; the second half of the context is in the first already.
    activity, _, context = row["query"].partition(": ")
    parts = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
    return parts | {"endings": row["endings"], "label": str(row["label"])}


def _race(rows: list[Row]) -> list[Row]:
    """One row per article; the harness asks its last question, after the others with their answers."""
    return [
        {
            "article": article,
            "problems": str(
                [
                    {"question": row["question"], "answer": "ABCD"[row["label"]], "options": row["options"]}
                    for row in questions
                ]
            ),
        }
        for article, questions in groupby(rows, key=lambda row: row["article"])
    ]


def _lambada_problem(row: Row) -> str | None:
    return None if row["text"].count(" ") else "has no word before the last one in its text"


def _mmlu(row: Row) -> Row:
    return {key: row[key] for key in ("subject", "question", "choices")} | {"answer": row["label"]}


def _longbench(row: Row) -> Row:
    return {key: row[key] for key in ("input", "context", "answers")} | {"all_classes": row.get("all_classes")}


def _lambada(source: str) -> LocalTask:
    return LocalTask("lambada", {"test": f"lambada_test_{source}.jsonl"}, {"text": str}, _lambada_problem)


def _arc_set(name: str) -> LocalTask:
    fields = {"question": str, "choices": list, "label": int}
    return LocalTask("arc", {"test": f"{name}_test.jsonl"}, fields, _label_among(lambda row: row["choices"]), _arc)


TASKS: dict[str, LocalTask] = {
    "piqa": LocalTask(
        "piqa",
        {"validation": "piqa_valid.jsonl"},
        {"goal": str, "sol1": str, "sol2": str, "label": int},
        _label_among(lambda row: [row["sol1"], row["sol2"]]),
    ),
    "arc_easy": _arc_set("arc_easy"),
    "arc_challenge": _arc_set("arc_challenge"),
    "winogrande": LocalTask(
        "winogrande",
        {"validation": "winogrande_xl_dev.jsonl"},
        {"sentence": str, "option1": str, "option2": str, "label": int},
        _winogrande_problem,
        _winogrande,
    ),
    "hellaswag": LocalTask(
        "hellaswag",
        {"validation": "hellaswag_val.jsonl"},
        {"query": str, "endings": list, "label": int},
        _hellaswag_problem,
        _hellaswag,
    ),
    "race": LocalTask(
        "race",
        {"test": "race_high_test.jsonl"},
        {"article": str, "question": str, "options": list, "label": int},
        _label_among(lambda row: row["options"], count=4),
        rows=_race,
    ),
    "lambada_openai": _lambada("openai"),
    "lambada_standard": _lambada("standard"),
    "mmlu": LocalTask(
        "mmlu/default",
        {"test": "mmlu_test.jsonl", "dev": "mmlu_dev.jsonl"},
        {"subject": str, "question": str, "choices": list, "label": int},
        _label_among(lambda row: row["choices"], count=4),
        _mmlu,
    ),
    "gsm8k": LocalTask("gsm8k", {"test": "gsm8k_test.jsonl"}, {"question": str, "answer": str}),
}


def local_task(name: str) -> LocalTask | None:
    """How a task's local rows look; also of one subject of MMLU and of one set of LongBench. None for any other."""
    if name.startswith("mmlu_"):
        return TASKS["mmlu"]
    if name.startswith("longbench_"):
        return LocalTask(
            "longbench", {"test": f"{name}.jsonl"}, {"input": str, "context": str, "answers": list}, row=_longbench
        )
    return TASKS.get(name)


def read_rows(folder: Path, task: LocalTask) -> dict[str, list[Row]]:
    """Split -> rows shaped like the hub's. Raises InputError naming file, line and field."""
    return {split: _rows(folder / name, task) for split, name in task.files.items()}


def _rows(path: Path, task: LocalTask) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        have = ", ".join(sorted(file.name for file in path.parent.glob("*.jsonl"))) or "no .jsonl file"
        raise InputError(f"{path} does not exist: expected the task's rows there; the folder has {have}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}; expected JSON lines in UTF-8") from error
    checked = [_checked(f"{path} line {number}", line, task) for number, line in enumerate(lines, 1) if line.strip()]
    if not checked:
        raise InputError(f"{path} has no rows: expected one JSON object a line")
    return [task.row(row) for row in task.rows(checked)]


def _checked(where: str, line: str, task: LocalTask) -> Row:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where} is not JSON: {error}; expected one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object: expected one with the fields {', '.join(task.fields)}")
    for field, kind in task.fields.items():
        if field not in row:
            raise InputError(f"{where} has no field {field!r}: expected {', '.join(task.fields)}")
        value = row[field]
        texts = kind is not list or (value and isinstance(value, list) and all(isinstance(v, str) for v in value))
        if type(value) is not kind or not texts:
            raise InputError(f"{where}: field {field!r} is {json.dumps(value)[:60]}: expected {_EXPECTED[kind]}")
    if wrong := task.problem(row):
        raise InputError(f"{where} {wrong}")
    return row
