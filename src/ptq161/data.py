"""Token tensors for calibration and evaluation, from the hub, from local files, or from the model itself.

A SOURCE is `wikitext2`, `c4` or `redpajama`; a `.txt`, `.raw`, `.utf8`, `.jsonl` or `.parquet` file; or `self`. All but
`self` take a half-open range of documents: `file.jsonl[0:1000]`, `wiki.utf8[90%:]`. The documents of a `.jsonl` are its
lines' `text`, of a `.parquet` its column `text`, of a text file its `<doc ...>` blocks, or else its lines. Without a
range, a text file's characters stay unchanged.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.config import CalibrationConfig, unknown
from ptq161.errors import InputError
from ptq161.hub import CORPORA, Split, corpus_documents
from ptq161.selftext import sample_from_model, vocabulary_size

SELF = "self"
TEXT_SUFFIXES = (".txt", ".raw", ".utf8")
# A few bytes of Parquet can say a text a billion times. Text compresses to a tenth; repeated text to a hundredth.
MAX_EXPANSION, MIN_EXPANDED_BYTES = 500, 2**26
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
_RANGE = re.compile(r"(?P<name>.+)\[(?P<bounds>[^\[\]]*)\]")
_BOUNDS = re.compile(r"(\d{1,18}%?)?:(\d{1,18}%?)?")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 and tokenizers cannot
_DOC_BLOCK = re.compile(r"^<doc [^\n]*>\n(.*?)^</doc>", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class DocumentRange:
    """A half-open range of documents; a bound is a number, a percentage such as `90%`, or empty."""

    first: str
    last: str

    def select(self, documents: Sequence[str], name: str) -> Sequence[str]:
        """The documents in range. Raises InputError if the range leaves the documents or is empty."""
        count = len(documents)
        first, last = _position(self.first or "0", count), _position(self.last or str(count), count)
        if last > count:
            raise InputError(f"{name} has {count} documents; the range [{self.first}:{self.last}] asks for {last}")
        if first >= last:
            raise InputError(f"the range [{self.first}:{self.last}] of {name} is empty ({count} documents)")
        return documents[first:last]


@dataclass(frozen=True)
class Source:
    """Where text comes from: a corpus of the hub, `self`, or a file; and which of its documents."""

    name: str
    documents: DocumentRange | None = None


def parse_source(text: str) -> Source:
    """Read a SOURCE argument without opening anything.

    Raises InputError for a malformed range, an unknown hub name or an unknown kind of file.
    """
    name, documents = text, None
    if match := _RANGE.fullmatch(text):
        name = match["name"]
        bounds = _BOUNDS.fullmatch(match["bounds"])
        if bounds is None:
            raise InputError(f"source {text!r}: expected a range like [0:1000], [1000:] or [0%:90%] at its end")
        documents = DocumentRange(bounds[1] or "", bounds[2] or "")
    if name == SELF and documents is not None:
        raise InputError(f"source {text!r}: text sampled from the model has no documents to choose a range of")
    if name in CORPORA or name == SELF or Path(name).suffix.lower() in FILE_SUFFIXES:
        return Source(name, documents)
    if Path(name).suffix or Path(name).exists():
        raise InputError(f"source {name!r} is not a kind of file known here: expected {', '.join(FILE_SUFFIXES)}")
    raise InputError(unknown("source", name, [*CORPORA, SELF]) + f", or a file ({', '.join(FILE_SUFFIXES)})")


def read_text(source: Source, split: Split) -> str:
    """The source's text: its characters unchanged, or the documents in range joined by a blank line (lines: a newline).

    Raises InputError if it cannot be read, is not UTF-8, is malformed or empty, or if the range does not fit.
    """
    documents: Sequence[str]
    path, joint = Path(source.name), "\n\n"
    if source.name in CORPORA:
        documents = corpus_documents(source.name, split)
    elif path.suffix.lower() == ".parquet":
        documents = _parquet_documents(path)
    elif path.suffix.lower() == ".jsonl":
        documents = _jsonl_documents(path)
    elif source.documents is None:
        documents = [_file_text(path)]
    else:
        text = _file_text(path)
        documents = [block.strip("\n") for block in _DOC_BLOCK.findall(text)]
        if not documents:
            documents, joint = text.removesuffix("\n").split("\n"), "\n"
    if source.documents is not None:
        documents = source.documents.select(documents, source.name)
    text = joint.join(documents)
    if _SURROGATE.search(text):
        raise InputError(f"{source.name} is not Unicode text: it has half a surrogate pair; write it anew as UTF-8")
    if not text.strip():
        raise InputError(f"{source.name} has no text in it: expected sentences to read")
    return text


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " tokens"]:
    """Held-out text as one run of tokens, tokenized once without special tokens. Raises InputError (see read_text)."""
    parsed = parse_source(source)
    if parsed.name == SELF:
        raise InputError("a model cannot be evaluated on its own samples: expected a file, wikitext2 or c4")
    return _tokenize(read_text(parsed, Split.EVALUATION), tokenizer)


def calibration_tokens(
    calibration: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> Int64[Tensor, "samples seq"]:
    """Calibration samples of `seqlen` tokens; with several sources, each gives an equal share, in their order.

    A text is tokenized once without special tokens and cut into non-overlapping windows, of which the share is drawn
    without replacement. The same settings give the same samples. `model` is what `self` samples from, and what token
    ids are checked against.

    Raises InputError for a source that cannot be used or is too short, and for tokens the model does not have.
    """
    return calibration_and_fresh_tokens(calibration, 0, tokenizer, model)[0]


def calibration_and_fresh_tokens(
    calibration: CalibrationConfig,
    fresh: int,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
) -> tuple[Int64[Tensor, "samples seq"], Int64[Tensor, "fresh seq"]]:
    """`calibration_tokens`, and up to `fresh` more windows of the same sources that are none of them, shuffled.

    Every source gives an equal share of the fresh windows, or as many as it has left. Asking for fresh windows changes
    none of the samples. Raises InputError.
    """
    sources = [parse_source(source) for source in calibration.sources]
    samples, seqlen = calibration.samples, calibration.seqlen
    if samples < len(sources):
        raise InputError(f"samples={samples} for {len(sources)} calibration sources: expected one each, at least")
    if model is not None:
        check_length(model, seqlen)
    generator = torch.Generator().manual_seed(calibration.seed)
    fresh_generator = torch.Generator().manual_seed(calibration.seed + 1)
    parts, more = [], []
    for source, count, extra in zip(sources, shares(samples, sources), shares(fresh, sources), strict=True):
        if source.name == SELF:
            if model is None:
                raise InputError("source 'self' is sampled from the model, and none was given: name a file instead")
            windows = sample_from_model(model, tokenizer.bos_token_id, count, seqlen, generator)
            if extra:
                written = sample_from_model(model, tokenizer.bos_token_id, extra, seqlen, fresh_generator)
                windows = torch.cat([windows, written])
        else:
            tokens = _tokenize(read_text(source, Split.CALIBRATION), tokenizer)
            windows = _draw_windows(tokens, count, extra, seqlen, generator, source.name)
        parts.append(windows[:count])
        more.append(windows[count:])
    drawn, left = torch.cat(parts), torch.cat(more)
    if model is not None:
        check_vocabulary(drawn, model)
        check_vocabulary(left, model)
    return drawn, left[torch.randperm(len(left), generator=generator)]


def check_vocabulary(tokens: Int64[Tensor, "..."], model: PreTrainedModel) -> None:
    """Raises InputError if a token id is beyond the model's input embedding."""
    size, highest = vocabulary_size(model), int(tokens.max()) if tokens.numel() else 0
    if highest >= size:
        raise InputError(
            f"token id {highest} is beyond the model's vocabulary of {size}: its tokenizer belongs to another model"
        )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raises InputError if the model has no positions for so many tokens. Rotary positions never run out."""
    positions = getattr(model.config, "max_position_embeddings", None)
    rotary = getattr(model.config, "rope_parameters", None) is not None
    if positions is not None and not rotary and length > positions:
        raise InputError(f"{length} tokens at once, but {type(model).__name__} has {positions} positions: use fewer")


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " tokens"]:
    # verbose=False: whole files are longer than the model's context on purpose, and the warning says otherwise.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def shares(count: int, sources: Sequence[object]) -> list[int]:
    """`count` divided among the sources; the first ones get what does not divide."""
    share, left = divmod(count, len(sources))
    return [share + (index < left) for index in range(len(sources))]


def _draw_windows(
    tokens: Int64[Tensor, " tokens"], samples: int, extra: int, seqlen: int, generator: torch.Generator, name: str
) -> Int64[Tensor, "samples seq"]:
    """`samples` windows, and up to `extra` more after them. Raises InputError if `samples` do not fit."""
    fitting = len(tokens) // seqlen
    if fitting < samples:
        raise InputError(
            f"{name} has {len(tokens)} tokens; {samples} samples of {seqlen} need {samples * seqlen}, and {fitting} "
            f"would fit: give a longer text, fewer --samples or a smaller --seqlen"
        )
    windows = tokens[: fitting * seqlen].view(fitting, seqlen)
    return windows[torch.randperm(fitting, generator=generator)[: samples + extra]]


def _position(bound: str, count: int) -> int:
    return count * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)


def _file_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read text from {path}: it is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read text from {path}: {error.strerror}; expected a file") from error


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: byte {error.start} ({error.reason}); convert it first") from error


def _file_text(path: Path) -> str:
    return _decode(_file_bytes(path), path)


def _jsonl_documents(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_file_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (RecursionError, ValueError) as error:  # nested too deeply; no JSON, or thousands of digits
            raise InputError(f"{path} line {number} is not JSON: {error}; expected one object a line") from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{path} line {number} has no text: expected an object like {{"text": "..."}}')
        documents.append(text)
    return documents


def _parquet_documents(path: Path) -> list[str]:
    content = _file_bytes(path)
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f'{path}: reading Parquet needs pyarrow; pip install "ptq161[hub]"') from error
    documents: list[str] = []
    left = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * len(content))
    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        columns = file.schema_arrow
        if columns.names.count("text") != 1 or str(columns.field("text").type) not in ("string", "large_string"):
            raise InputError(f"{path} has no one column `text` of strings; columns: {', '.join(columns.names)}")
        for batch in file.iter_batches(batch_size=64, columns=["text"]):
            if batch.column(0).null_count:
                raise InputError(f"{path} has no text in every row of its column `text`")
            left -= batch.nbytes
            if left < 0:
                raise InputError(f"{path} unpacks to more than {MAX_EXPANSION} times its size: no honest text does")
            documents += batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from error
    return documents
