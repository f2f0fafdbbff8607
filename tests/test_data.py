import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
from families import FAMILIES, build

from ptq161.config import CalibrationConfig
from ptq161.data import (
    DocumentRange,
    Source,
    calibration_and_fresh_tokens,
    calibration_tokens,
    check_length,
    evaluation_tokens,
    parse_source,
    read_text,
)
from ptq161.errors import InputError
from ptq161.hub import Split

LETTERS = [chr(ord("a") + index) for index in range(10)]


def text_of(source, split=Split.EVALUATION):
    return read_text(parse_source(str(source)), split)


def decoded(tokens, tokenizer):
    return tokenizer.decode(tokens.tolist())


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "ten.jsonl"
    path.write_text("".join(json.dumps({"text": letter, "id": 1}) + "\n" for letter in LETTERS), encoding="utf-8")
    return path


# Sources and ranges


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("wikitext2", Source("wikitext2")),
        ("c4[0:1000]", Source("c4", DocumentRange("0", "1000"))),
        ("self", Source("self")),
        ("a b/c.TXT", Source("a b/c.TXT")),
        ("x[1].jsonl", Source("x[1].jsonl")),
        ("x[1].jsonl[3:]", Source("x[1].jsonl", DocumentRange("3", ""))),
        ("w.utf8[:90%]", Source("w.utf8", DocumentRange("", "90%"))),
        ("p.parquet[:]", Source("p.parquet", DocumentRange("", ""))),
    ],
)
def test_sources_are_read_as_typed(argument, expected):
    assert parse_source(argument) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("wikitext", r"unknown source 'wikitext' \(did you mean 'wikitext2'\?\)"),
        ("notes.md", r"expected \.txt, \.raw, \.utf8, \.jsonl, \.parquet"),
        ("x.txt[3]", r"expected a range like \[0:1000\]"),
        ("x.txt[-3:]", r"expected a range like"),
        ("x.txt[1:2:3]", r"expected a range like"),
        ("self[0:3]", r"no documents to choose a range of"),
    ],
)
def test_a_source_that_cannot_be_is_refused_in_one_line(argument, message):
    with pytest.raises(InputError, match=message) as error:
        parse_source(argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [("[2:4]", "c d"), ("[:2]", "a b"), ("[8:]", "i j"), ("[90%:]", "j"), ("[0%:15%]", "a"), ("[1:20%]", "b")],
)
def test_ranges_are_half_open_and_take_percentages(jsonl, bounds, expected):
    assert text_of(f"{jsonl}{bounds}") == expected.replace(" ", "\n\n")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("[0:11]", "has 10 documents; the range .* asks for 11"),
        ("[10:]", "is empty"),
        ("[4:4]", "is empty"),
        ("[5:2]", "is empty"),
        ("[0%:101%]", "is empty|asks for"),
        ("[0%:5%]", "is empty"),
    ],
)
def test_ranges_outside_the_documents_are_refused(jsonl, bounds, message):
    if bounds == "[0%:101%]":  # 101 % of ten documents rounds down to ten, so it needs a hundred to show
        jsonl.write_text(jsonl.read_text() * 10)
    with pytest.raises(InputError, match=message):
        text_of(f"{jsonl}{bounds}")


# Reading files


def test_a_whole_text_file_keeps_its_characters(tmp_path):
    content = "  one\r\n\n = Title = \n\ttwo\u2028three \n\n"
    (tmp_path / "x.raw").write_bytes(content.encode())
    assert text_of(tmp_path / "x.raw") == content


def test_a_range_of_a_text_file_is_a_range_of_its_lines(tmp_path):
    (tmp_path / "x.txt").write_text("a\nb\n\nc\n", encoding="utf-8")
    assert text_of(f"{tmp_path}/x.txt[1:]") == "b\n\nc"
    with pytest.raises(InputError, match="has 4 documents"):
        text_of(f"{tmp_path}/x.txt[0:5]")


def test_a_range_of_a_file_with_doc_blocks_is_a_range_of_its_documents(tmp_path):
    blocks = ['<doc id="1" title="A > B">\nA > B\n\nfirst\n\n</doc>\n', '<doc id="2">\nsecond </doc> still\n</doc>\n']
    (tmp_path / "x.utf8").write_text("".join(blocks), encoding="utf-8")
    assert text_of(f"{tmp_path}/x.utf8[0:1]") == "A > B\n\nfirst"
    assert text_of(f"{tmp_path}/x.utf8[:]") == "A > B\n\nfirst\n\nsecond </doc> still"
    assert text_of(f"{tmp_path}/x.utf8") == "".join(blocks)


def test_parquet_gives_the_same_text_as_jsonl(tmp_path, jsonl):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1] * 10, "text": LETTERS}), tmp_path / "x.parquet")
    assert text_of(tmp_path / "x.parquet") == text_of(jsonl) == "\n\n".join(LETTERS)
    assert text_of(f"{tmp_path}/x.parquet[2:3]") == "c"


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.txt: No such file"):
        text_of(tmp_path / "missing.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"folder\.txt: it is not a regular file"):
        text_of(tmp_path / "folder.txt")


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything, nobody may not
    try:
        with pytest.raises(InputError, match=r"secret\.txt: Permission denied"):
            text_of(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "has no text in it"),
        ("x.txt", b" \n\n ", "has no text in it"),
        ("x.txt", b"caf\xe9 au lait", "is not UTF-8: byte 3"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"content": "b"}\n', "line 2 has no text"),
        ("x.jsonl", b'["text"]\n', "line 1 has no text"),
        ("x.jsonl", b'{"text": 5}\n', "line 1 has no text"),
        ("x.jsonl", b'{"text": ""}\n', "has no text in it"),
        ("x.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
        ("x.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("x.jsonl", b"9" * 5000, "line 1 is not JSON"),
        ("x.parquet", b"PAR1 not really", "is not a readable Parquet file"),
    ],
)
def test_bad_content_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        text_of(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("columns", [{"body": ["a"]}, {"text": ["a", None]}, {"text": [1, 2]}])
def test_parquet_without_text_in_every_row_is_refused(tmp_path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column `text`"):
        text_of(tmp_path / "x.parquet")


def test_parquet_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path):
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(0, 20_000), ["word " * 2000])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": text}).cast(pyarrow.schema({"text": "string"})), tmp_path / "x.parquet"
    )
    with pytest.raises(InputError, match="unpacks to more than 500 times its size"):
        text_of(tmp_path / "x.parquet")


def test_pipes_are_no_text(tmp_path):
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(InputError, match="not a regular file"):
        text_of(tmp_path / "x.txt")


# Tokens


def test_evaluation_tokens_are_the_text_tokenized_once(evaluation_file, tokenizer):
    tokens = evaluation_tokens(str(evaluation_file), tokenizer)
    assert tokens.dtype == torch.int64 and tokens.ndim == 1
    assert decoded(tokens, tokenizer) == evaluation_file.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="its own samples"):
        evaluation_tokens("self", tokenizer)


def test_no_special_tokens_and_no_warning_about_length(evaluation_file, stories_folder, capfd):
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(stories_folder)
    stories.add_bos_token = True
    tokens = evaluation_tokens(str(evaluation_file), stories)
    assert len(tokens) > stories.model_max_length
    assert stories.bos_token_id not in tokens
    assert "longer than" not in capfd.readouterr().err


def test_calibration_windows_are_distinct_cuts_of_the_text(calibration_file, tokenizer):
    text = calibration_file.read_text(encoding="utf-8")
    settings = CalibrationConfig(sources=(str(calibration_file),), samples=20, seqlen=50)
    samples = calibration_tokens(settings, tokenizer)
    assert samples.shape == (20, 50) and samples.dtype == torch.int64
    windows = [text[start : start + 50] for start in range(0, len(text) - 49, 50)]
    drawn = [decoded(sample, tokenizer) for sample in samples]
    places = [windows.index(sample) for sample in drawn]
    assert len(set(places)) == 20
    assert places != sorted(places)
    assert torch.equal(samples, calibration_tokens(settings, tokenizer))
    assert not torch.equal(samples, calibration_tokens(settings.replaced({"seed": 1}), tokenizer))


def test_every_window_is_drawn_once_when_all_are_asked_for(tmp_path, tokenizer):
    path = tmp_path / "x.txt"
    path.write_text("".join(LETTERS) + "k", encoding="utf-8")  # eleven tokens: the last fits in no window
    samples = calibration_tokens(CalibrationConfig(sources=(str(path),), samples=5, seqlen=2), tokenizer)
    assert sorted(decoded(sample, tokenizer) for sample in samples) == ["ab", "cd", "ef", "gh", "ij"]


def test_a_text_too_short_says_how_many_samples_would_fit(tmp_path, tokenizer):
    path = tmp_path / "x.txt"
    path.write_text("".join(LETTERS), encoding="utf-8")
    with pytest.raises(InputError, match=r"has 10 tokens; 4 samples of 3 need 12, and 3 would fit"):
        calibration_tokens(CalibrationConfig(sources=(str(path),), samples=4, seqlen=3), tokenizer)


def test_several_sources_share_the_samples_and_the_first_take_the_remainder(tmp_path, tokenizer):
    paths = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in paths:
        path.write_text(path.stem * 40, encoding="utf-8")
    settings = CalibrationConfig(sources=tuple(map(str, paths)), samples=8, seqlen=4)
    samples = calibration_tokens(settings, tokenizer)
    assert [decoded(sample, tokenizer)[0] for sample in samples] == list("aaabbbcc")
    with pytest.raises(InputError, match="samples=2 for 3 calibration sources"):
        calibration_tokens(settings.replaced({"samples": 2}), tokenizer)


def test_a_bad_source_is_refused_before_any_is_read(tokenizer):
    with pytest.raises(InputError, match="unknown source 'c5'"):
        calibration_tokens(CalibrationConfig(sources=("missing.txt", "c5")), tokenizer)


def test_self_needs_the_model_and_mixes_with_files(calibration_file, tokenizer):
    settings = CalibrationConfig(sources=("self", str(calibration_file)), samples=5, seqlen=12)
    with pytest.raises(InputError, match="'self' is sampled from the model"):
        calibration_tokens(settings, tokenizer)
    model = build(FAMILIES["llama"]())
    samples = calibration_tokens(settings, tokenizer, model)
    assert samples.shape == (5, 12)
    assert torch.equal(samples, calibration_tokens(settings, tokenizer, model))
    text = calibration_file.read_text(encoding="utf-8")
    assert [decoded(sample, tokenizer) in text for sample in samples] == [False] * 3 + [True] * 2


def windows(samples):
    return {tuple(sample) for sample in samples.tolist()}


def test_fresh_windows_are_no_calibration_samples_and_leave_these_alone(calibration_file, tokenizer):
    settings = CalibrationConfig(sources=(str(calibration_file),), samples=20, seqlen=50)
    samples, fresh = calibration_and_fresh_tokens(settings, 30, tokenizer)
    assert (samples.shape, fresh.shape) == ((20, 50), (30, 50))
    assert torch.equal(samples, calibration_tokens(settings, tokenizer))
    assert len(windows(samples) | windows(fresh)) == 50
    text = calibration_file.read_text(encoding="utf-8")
    places = [text.index(decoded(sample, tokenizer)) for sample in fresh]
    assert all(place % 50 == 0 for place in places) and places != sorted(places)
    again, other = (
        calibration_and_fresh_tokens(settings.replaced({"seed": seed}), 30, tokenizer)[1] for seed in (0, 1)
    )
    assert torch.equal(fresh, again) and not torch.equal(fresh, other)


def test_no_fresh_windows_where_none_are_asked_for(calibration_file, tokenizer):
    settings = CalibrationConfig(sources=(str(calibration_file),), samples=3, seqlen=50)
    assert calibration_and_fresh_tokens(settings, 0, tokenizer)[1].shape == (0, 50)


def test_fresh_windows_are_shared_over_sources_and_shuffled(tmp_path, tokenizer):
    paths = [tmp_path / f"{letter}.txt" for letter in "abc"]
    for path in paths:
        path.write_text(path.stem * 40, encoding="utf-8")  # ten windows each
    settings = CalibrationConfig(sources=tuple(map(str, paths)), samples=6, seqlen=4)
    samples, fresh = calibration_and_fresh_tokens(settings, 11, tokenizer)
    assert [decoded(sample, tokenizer)[0] for sample in samples] == list("aabbcc")
    letters = [decoded(sample, tokenizer)[0] for sample in fresh]
    assert sorted(letters) == list("aaaabbbbccc") and letters != sorted(letters)


def test_a_short_text_gives_as_many_fresh_windows_as_are_left(tmp_path, tokenizer):
    long, short = tmp_path / "a.txt", tmp_path / "b.txt"
    long.write_text("a" * 80, encoding="utf-8")
    short.write_text("b" * 15, encoding="utf-8")  # three windows of four, one of them a sample
    settings = CalibrationConfig(sources=(str(long), str(short)), samples=2, seqlen=4)
    _, fresh = calibration_and_fresh_tokens(settings, 10, tokenizer)
    assert sorted(decoded(sample, tokenizer)[0] for sample in fresh) == list("aaaaabb")
    _, none = calibration_and_fresh_tokens(settings.replaced({"sources": str(short), "samples": 3}), 10, tokenizer)
    assert none.shape == (0, 4)


@pytest.mark.parametrize("order", [("self", "file"), ("file", "self")])
def test_fresh_text_of_the_model_leaves_the_samples_alone(order, calibration_file, tokenizer):
    sources = tuple({"file": str(calibration_file)}.get(name, name) for name in order)
    settings = CalibrationConfig(sources=sources, samples=5, seqlen=12)
    model = build(FAMILIES["llama"]())
    samples, fresh = calibration_and_fresh_tokens(settings, 4, tokenizer, model)
    assert torch.equal(samples, calibration_tokens(settings, tokenizer, model))
    assert len(fresh) == 4 and not windows(samples) & windows(fresh)


def test_fresh_tokens_beyond_the_vocabulary_are_refused(tmp_path, tokenizer):
    path = tmp_path / "x.txt"
    path.write_text("a" * 60 + "Z" * 60, encoding="utf-8")
    config = FAMILIES["llama"]()
    config.vocab_size = tokenizer("Z", add_special_tokens=False).input_ids[0]
    model = build(config)
    refused = 0
    for seed in range(4):  # some seeds draw samples of `a` alone
        settings = CalibrationConfig(sources=(str(path),), samples=1, seqlen=10, seed=seed)
        try:
            calibration_tokens(settings, tokenizer, model)
        except InputError:
            continue
        with pytest.raises(InputError, match="beyond the model's vocabulary"):
            calibration_and_fresh_tokens(settings, 11, tokenizer, model)
        refused += 1
    assert refused


def test_tokens_beyond_the_vocabulary_are_refused(calibration_file, tokenizer):
    config = FAMILIES["llama"]()
    config.vocab_size = 20
    settings = CalibrationConfig(sources=(str(calibration_file),), samples=2, seqlen=16)
    with pytest.raises(InputError, match=r"token id \d+ is beyond the model's vocabulary of 20"):
        calibration_tokens(settings, tokenizer, build(config))


def test_only_models_with_learned_positions_run_out_of_them():
    check_length(build(FAMILIES["llama"]()), 500)
    check_length(build(FAMILIES["opt"]()), 128)
    with pytest.raises(InputError, match="129 tokens at once, but OPTForCausalLM has 128 positions"):
        check_length(build(FAMILIES["opt"]()), 129)
