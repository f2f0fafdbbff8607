import json

import datasets
import httpx
import pytest

from ptq161 import hub
from ptq161.data import evaluation_tokens, parse_source, read_text
from ptq161.errors import InputError
from ptq161.hub import CORPORA, Corpus, Split, corpus_documents, hub_reachable


class Session:
    def __init__(self, outcome):
        self.outcome = outcome

    def head(self, url, timeout):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "expected"), [(httpx.Response(200), True), (httpx.ConnectError("no route"), False)]
)
def test_the_hub_is_asked_once(monkeypatch, outcome, expected):
    monkeypatch.setattr(hub, "get_session", lambda: Session(outcome))
    assert hub_reachable() is expected


@pytest.mark.parametrize(
    ("split", "instead"), [(Split.CALIBRATION, r"--calib FILE\|self"), (Split.EVALUATION, "--ppl FILE")]
)
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_without_the_hub_the_error_says_what_to_give_instead(monkeypatch, name, split, instead):
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    with pytest.raises(InputError, match=rf"{name} comes from the Hugging Face hub.*{instead}") as error:
        read_text(parse_source(name), split)
    assert "\n" not in str(error.value)


def test_a_corpus_the_hub_does_not_give_is_an_input_error(monkeypatch):
    def refuse(**arguments):
        raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"c4 could not be read from the Hugging Face hub \(gone for good\)"):
        corpus_documents("c4", Split.CALIBRATION)


def test_redpajama_has_no_held_out_text():
    with pytest.raises(InputError, match="redpajama has no held-out text for evaluation"):
        corpus_documents("redpajama", Split.EVALUATION)


@pytest.mark.parametrize("name", list(CORPORA))
def test_calibration_and_evaluation_never_read_the_same_text(name):
    read = {split: [str(part) for part in parts] for split, parts in CORPORA[name].splits.items()}
    assert read[Split.CALIBRATION]
    assert not set(read[Split.CALIBRATION]) & set(read.get(Split.EVALUATION, []))
    assert all("train" in part for part in read[Split.CALIBRATION])


def test_a_corpus_is_streamed_part_by_part_up_to_its_cap(monkeypatch, tmp_path, tokenizer):
    parts = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(5)), encoding="utf-8")
        parts.append({"path": "json", "data_files": str(path), "split": "train"})
    corpus = Corpus({Split.EVALUATION: tuple(parts)}, characters=12)
    monkeypatch.setitem(CORPORA, "c4", corpus)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    expected = ["first 0", "first 1", "second 0", "second 1"]
    assert corpus_documents("c4", Split.EVALUATION) == expected
    assert tokenizer.decode(evaluation_tokens("c4", tokenizer).tolist()) == "\n\n".join(expected)
    assert tokenizer.decode(evaluation_tokens("c4[3:]", tokenizer).tolist()) == "second 1"
    monkeypatch.setitem(CORPORA, "c4", Corpus(corpus.splits))
    assert len(corpus_documents("c4", Split.EVALUATION)) == 10


@pytest.mark.network
@pytest.mark.parametrize("name", list(CORPORA))
def test_the_hub_gives_every_corpus(name):
    documents = corpus_documents(name, Split.CALIBRATION)
    assert sum(map(len, documents)) > 1_000_000
