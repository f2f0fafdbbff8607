"""Hostile settings files (TOML) and calibration texts by chance, for the fuzzer (fuzzing.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
from mutants import cut, flip_bits, raw_json, replace_file
from pyarrow import parquet

SETTINGS = """\
# every kind of setting
method = "mixed"
bits = 1.61
allocation = "fisher"
angular = false
epochs = 4
batch_size = 1
lr_scale = 5e-3
magnitude = "relative"
distill = "auto"
distill_fresh = true
distill_tokens = 200_000
seed = 0
samples = 32
seqlen = 512
sources = ["wikitext2", "self"]
"""
TOML_VALUES = [
    "0", "-1", "1.5", "nan", "inf", "-inf", "1e999", "1" * 400, "9" * 5000, "0x" + "f" * 5000, "9223372036854775808",
    "true", "false", '""', '"none"', '"x"', '"' + "x" * 100_000 + '"', '"\\u0000"', '"a\\nb"', "[]", "[1, 2]",
    '["a", 1]',
    "[[[]]]", "{}", "{ a = 1 }", "1979-05-27", "07:32:00", "[" * 5000 + "]" * 5000, '"""\nx\n"""', "1_000", "=", "",
    '"self"',
    '["/etc/passwd"]', "1e18", "2147483648", "18446744073709551616", "1e400",
]  # fmt: skip
TOML_LINES = [
    "[table]", "[[rows]]", "a.b.c = 1", "epochs = 5", '"" = 1', "unknown = 1", "é = 1", "'a\nb' = 1",
    "salient_ratio = 0.2",
    "__class__ = 1", "sources = 5", "sources = [5]", "= 3", "x" * 100_000 + " = 1", "a." * 5000 + "b = 1",
    "preset = 'paper'",
    "overwrite = true", "calib = 'x'", "blocks = [0, 1]",
]  # fmt: skip
JSONL_LINES = [
    "", "{", "7", "null", '"text"', '{"text": 5}', '{"text": null}', '{"Text": "x"}', '{"text": "\\ud800"}',
    "[" * 200_000,
    '{"a":' * 200_000, '{"text": "x", "n": ' + "9" * 5000 + "}", '{"text": "a", "text": 3}', '{"text": NaN}',
    '{"text": "\\u0000"}',
    '{"text": ""}', '{"text": "\u2028 a \x85 b"}', "\ufeff{}", '{"text": "' + "x" * 100_000 + '"}',
]  # fmt: skip
RANGES = ["", "", "", "[0:2]", "[1:]", "[50%:100%]", "[:9999]", "[3:2]", "[0%:200%]", f"[{'9' * 5000}:]", "[:\u0661]"]


def edit_toml(rng: Random, file: Path) -> str:
    """Another value for one setting, or another line."""
    lines = file.read_text().splitlines()
    place = rng.randrange(1, len(lines))
    if rng.random() < 0.7:
        key, value = lines[place].partition(" =")[0], rng.choice(TOML_VALUES)
        lines[place] = f"{key} = {value}"
    else:
        lines.insert(place, rng.choice(TOML_LINES))
    file.write_text("\n".join(lines))
    return f"line {place}: {lines[place][:40]!r}"


def edit_jsonl(rng: Random, file: Path) -> str:
    """One line of JSON Lines replaced."""
    lines = file.read_text().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = rng.choice(JSONL_LINES)
    file.write_text("\n".join(lines), encoding="utf-8", newline="\n")
    return f"line {place}: {lines[place][:30]!r}"


def edit_text(rng: Random, file: Path) -> str:
    """Characters that text seldom has."""
    inserted = rng.choice(
        ["\0", "\r\r\n", "\ufeff", "\u202e", "<doc a>\n" * 50, "</doc>\n", "\U0010ffff", "é" * 1000, "<s></s>"]
    )
    content = file.read_text()
    place = rng.randrange(len(content))
    file.write_text(content[:place] + inserted + content[place:], encoding="utf-8", newline="")
    return f"inserted {inserted[:10]!r}"


def another_parquet(rng: Random, file: Path) -> str:
    """A Parquet file of another schema, or one that unpacks to much more than its size."""
    text = pyarrow.array(["a b c"] * 9)
    tables = [
        lambda: pyarrow.table({"txt": text}), lambda: pyarrow.table({"text": pyarrow.array(range(9))}),
        lambda: pyarrow.table({"text": pyarrow.array([["a"]] * 9)}), lambda: pyarrow.table([text, text],
        names=["text", "text"]),
        lambda: pyarrow.table({"text": pyarrow.array([None, "a"])}), lambda: pyarrow.table({"text": text[:0]}),
        lambda: pyarrow.table({"text": pyarrow.array([b"\xff\xfe"] * 9, pyarrow.binary())}),
        lambda: pyarrow.table({"text": pyarrow.array([b"\xff"] * 9, pyarrow.binary()).view(pyarrow.string())}),
        lambda: pyarrow.table({"text": text.cast(pyarrow.large_string())}),
        lambda: pyarrow.table({"text": text.dictionary_encode()}),
        lambda: pyarrow.table({"text": pyarrow.repeat("word " * 2000, rng.choice([0, 8000]))}),
        lambda: pyarrow.table({"text": text, "x\n" * 500: pyarrow.array(range(9))}),
        lambda: pyarrow.table({"text": text, "big": pyarrow.array([0] * 9)}),
    ]  # fmt: skip
    kind = rng.randrange(len(tables))
    parquet.write_table(tables[kind](), file)
    return f"another table ({kind})"


BYTES: list[Callable[[Random, Path], str]] = [flip_bits, flip_bits, cut, replace_file]
TEXT_MUTATORS: dict[str, list[Callable[[Random, Path], str]]] = {
    "settings.toml": [edit_toml, edit_toml, edit_toml, edit_toml, *BYTES, raw_json],
    "calibration.jsonl": [edit_jsonl, edit_jsonl, edit_jsonl, *BYTES, raw_json],
    "calibration.txt": [edit_text, edit_text, *BYTES],
    "calibration.parquet": [another_parquet, *BYTES],
}


def write_texts(folder: Path) -> None:
    """Sound settings and calibration files."""
    folder.mkdir(parents=True)
    sentences = [f"The river holds {n} stones, and the {n + 1}th is a lamp." for n in range(20)]
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "calibration.txt").write_text("\n".join(sentences))
    (folder / "calibration.jsonl").write_text("\n".join(json.dumps({"text": line, "n": 1}) for line in sentences))
    parquet.write_table(pyarrow.table({"text": sentences, "n": list(range(20))}), folder / "calibration.parquet")
