"""What comes from the Hugging Face hub: whether it answers, and the three text corpora that the literature uses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from textwrap import shorten
from typing import Any

import httpx
from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled

from ptq161.errors import InputError


class Split(StrEnum):
    """What the text is for: calibration never sees what evaluation reads."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Corpus:
    """Per split, the arguments of `datasets.load_dataset` for each part; characters: how much of a part is read."""

    splits: Mapping[Split, tuple[Mapping[str, Any], ...]] = field(repr=False)
    characters: int | None = None


def _c4(split: str, shard: str) -> tuple[Mapping[str, Any], ...]:
    return ({"path": "allenai/c4", "data_files": {split: f"en/c4-{split}.{shard}.json.gz"}, "split": split},)


def _wikitext2(split: str) -> tuple[Mapping[str, Any], ...]:
    return ({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": split},)


# The sample repository is a loading script, which `datasets` no longer runs: its files are read one by one. Without
# the books, each of which would be longer than all the others' share.
_REDPAJAMA = tuple(
    {
        "path": "json",
        "data_files": f"hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/{name}_sample.jsonl",
        "split": "train",
    }
    for name in (
        "arxiv",
        "c4",
        *(f"cc_{dump}" for dump in ("2019-30", "2020-05", "2021-04", "2022-05", "2023-06")),
        "github",
        "stackexchange",
        "wikipedia",
    )
)

# Splits and shards as in GPTQ's code. The caps are far above what calibration takes (128 x 2048 tokens are about a
# million characters) and far below the size of a shard.
CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus({Split.CALIBRATION: _wikitext2("train"), Split.EVALUATION: _wikitext2("test")}),
    "c4": Corpus(
        {Split.CALIBRATION: _c4("train", "00000-of-01024"), Split.EVALUATION: _c4("validation", "00000-of-00008")},
        characters=10_000_000,
    ),
    "redpajama": Corpus({Split.CALIBRATION: _REDPAJAMA}, characters=2_000_000),
}


def hub_reachable() -> bool:
    """Ask once, for at most ten seconds; the hub's own client would retry for half a minute before it gave up."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except (httpx.HTTPError, OfflineModeIsEnabled):
        return False
    return True


def corpus_documents(name: str, split: Split) -> list[str]:
    """The documents of one corpus, streamed, up to its cap of characters per part.

    Raises InputError if the hub cannot be reached or does not give the corpus, or if it has no such split.
    """
    corpus = CORPORA[name]
    if split not in corpus.splits:
        raise InputError(f"{name} has no held-out text for {split}: use wikitext2, c4 or a file")
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise InputError(f'{name} is read through datasets; pip install "ptq161[hub]"') from error
    instead = "--calib FILE|self" if split is Split.CALIBRATION else "--ppl FILE"
    if not hub_reachable():
        raise InputError(f"{name} comes from the Hugging Face hub, which cannot be reached from here: give {instead}")
    try:
        return [text for part in corpus.splits[split] for text in _stream(part, corpus.characters)]
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"{name} could not be read from the Hugging Face hub ({reason}): give {instead}") from error


def _stream(part: Mapping[str, Any], characters: int | None) -> Iterator[str]:
    from datasets import load_dataset

    seen = 0
    for row in load_dataset(**part, streaming=True):
        yield row["text"]
        seen += len(row["text"])
        if characters is not None and seen >= characters:
            return
