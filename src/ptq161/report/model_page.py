"""The page about one packed model: what it weighs, what quantizing it lost, what it says; for readers of no paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ptq161.report import page
from ptq161.report.figures import (
    WHOLE,
    Channels,
    bits_figure,
    channels_figure,
    corner_figure,
    loss_figure,
    part,
    storage_figure,
)


@dataclass(frozen=True)
class Evaluation:
    """One row of the perplexity table; `result` is the JSON of `ptq161 eval`."""

    name: str
    file_bytes: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """What both models wrote after the same prompt, unedited."""

    prompt: str
    original: str
    packed: str


@dataclass(frozen=True)
class Corner:
    """Stored levels in the first rows and channels of one linear: codes by row, and which channels are salient."""

    linear: str
    codes: Sequence[Sequence[int]]
    salient: Sequence[bool]


@dataclass(frozen=True)
class ModelResults:
    """Everything on the page. `quantize` and `inspect` are the JSON of those commands."""

    name: str
    source_label: str  # what the source file is, e.g. "source file (GGUF, Q4_1)"
    source_bytes: int
    quantize: Mapping[str, Any]
    inspect: Mapping[str, Any]
    evaluations: Sequence[Evaluation]  # the original first, the packed model last
    channels: Sequence[Channels]
    corner: Corner
    samples: Sequence[Sample]
    commands: Sequence[str]
    caveats: Sequence[str]


def model_page(results: ModelResults) -> str:
    """The whole page as HTML."""
    bits = results.inspect["bits_per_weight"]
    title = f"{results.name} at {bits:.2f} bits per weight"
    return page.document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            *_summary(results),
            *_format(results),
            *_storage(results),
            *_losses(results),
            *_channels(results),
            *_perplexity(results),
            *_samples(results),
            *_commands(results),
        ],
    )


def megabytes(size: int) -> str:
    """Bytes as millions of bytes."""
    return f"{size / 1e6:.1f} MB"


def perplexities(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(source, perplexity entry) pairs of an `eval` JSON."""
    return list(result["perplexity"].items())


def _summary(results: ModelResults) -> list[str]:
    inspected, first, last = results.inspect, results.evaluations[0], results.evaluations[-1]
    (_, before), (_, after) = perplexities(first.result)[0], perplexities(last.result)[0]
    left = inspected["dense_linears"]
    untouched = f" ({left} linear layers were left as they are)" if left else ""
    return [
        page.paragraph(
            f"Every weight of {inspected['quantized_linears']} linear layers of this language model was replaced by "
            f"little more than its sign{untouched}. Nothing was retrained: a calibration text was run through the "
            "model, block by block, to decide which few weights deserve 4 bits and how large the signs should count. "
            "This page shows what that saved and what it cost."
        ),
        page.tiles(
            [
                (f"{inspected['bits_per_weight']:.3f} bits", "per weight of the linear layers, everything counted"),
                (f"{inspected['times_smaller']:.1f}×", "smaller linear layers than at 16 bits a weight"),
                (megabytes(inspected["file_bytes"]), f"whole file; it was {megabytes(results.source_bytes)}"),
                (f"{before['ppl']:.1f} → {after['ppl']:.1f}", "perplexity, original → packed (lower is better)"),
            ]
        ),
        *(page.paragraph(caveat, "warning") for caveat in results.caveats),
    ]


def _format(results: ModelResults) -> list[str]:
    corner = results.corner
    return [
        "<h2>What a weight becomes</h2>",
        page.paragraph(
            "A linear layer multiplies its inputs with a matrix: one column for each input channel, one row for each "
            "output. Some input channels carry far larger values than others, and an error in their column costs "
            "more. Those salient columns (orange) keep 4 bits a weight, a number from 0 to 15. Of all other weights "
            "only the sign is kept, + or −, with one size per row and one per column to scale it."
        ),
        page.figure(
            "corner",
            lambda width: corner_figure(corner.codes, corner.salient, width),
            f"A corner of {corner.linear}: a grid of plus and minus signs with a few columns of numbers from 0 to 15.",
            f"The first rows and columns of {corner.linear}, as they lie in the file.",
        ),
    ]


def _storage(results: ModelResults) -> list[str]:
    inspected = results.inspect
    parts, rest = inspected["parts"], inspected["other_bytes"] + inspected["header_bytes"]
    files = {
        "16 bits": {"dense": inspected["linears_fp16_bytes"], "other": rest},
        results.source_label: {WHOLE: results.source_bytes},
        "packed": {**parts, "other": rest},
    }
    weights = inspected["quantized_weights"]
    rows = [(part(name)[0], f"{size:,}", f"{8 * size / weights:.4f}") for name, size in parts.items() if size]
    rows.append(("linear layers in all", f"{sum(parts.values()):,}", f"{inspected['bits_per_weight']:.4f}"))
    rows.append((part("other")[0], f"{rest:,}", ""))
    rows.append(("whole file", f"{inspected['file_bytes']:,}", ""))
    paper = inspected["paper_bits"]
    formula = "" if paper is None else f" The paper's own formula, which leaves some of them out, gives {paper:.3f}."
    return [
        "<h2>Where the bytes are</h2>",
        page.figure(
            "storage",
            lambda width: storage_figure(files, width),
            "File sizes: " + "; ".join(f"{name} {megabytes(sum(sizes.values()))}" for name, sizes in files.items()),
            "The same model in three files. Embedding, norms and whatever else is not quantized make up "
            f"{rest / inspected['file_bytes']:.0%} of the packed file.",
        ),
        page.figure(
            "bits",
            lambda width: bits_figure(parts, weights, width),
            "Bits per weight by part: " + "; ".join(f"{name} {bits}" for name, _, bits in rows if bits),
            f"All bytes stored because of quantization, over {weights:,} weights: sign bits, codes, factors, mask and "
            f"padding.{formula}",
        ),
        page.table(("part", "bytes", "bits per weight"), rows, numbers=(1, 2), totals=(len(rows) - 3, len(rows) - 1)),
    ]


def _losses(results: ModelResults) -> list[str]:
    blocks = results.quantize["blocks"]
    worse = [str(block["index"]) for block in blocks if block["loss_last"] >= block["loss_first"]]
    verdict = f"Not better than its start: block {', '.join(worse)}." if worse else "Every block ends below its start."
    return [
        "<h2>Block by block</h2>",
        page.paragraph(
            "The model is quantized one decoder block at a time. The signs stay fixed; their sizes per row and per "
            "column are learned so that the block's output on the calibration text comes close to that of the "
            "original block, in size and in direction."
        ),
        page.figure(
            "loss",
            lambda width: loss_figure(blocks, width),
            f"Loss of {len(blocks)} blocks before learning and as stored. {verdict}",
            "Error in size plus negative logarithm of the cosine, against two targets (the original block on the "
            f"original stream and on the quantized one), mean over the calibration text. {verdict}",
        ),
    ]


def _channels(results: ModelResults) -> list[str]:
    return [
        "<h2>Which channels keep 4 bits</h2>",
        page.figure(
            "channels",
            lambda width: channels_figure(results.channels, width),
            "Magnitude of every input channel in "
            + ", ".join(f"block {shown.block} {shown.linear}" for shown in results.channels)
            + "; the salient channels are the largest.",
            f"How large the values are that reach each input channel of some layers: {results.channels[0].measure} in "
            "the original model on the calibration text. The mask marks the largest. It chooses whole columns, not "
            "single weights: that is why it costs next to nothing, one bit per channel.",
        ),
    ]


def _perplexity(results: ModelResults) -> list[str]:
    baseline = dict(perplexities(results.evaluations[0].result))
    rows = []
    for evaluation in results.evaluations:
        bits = evaluation.result["bits_per_weight"]
        for source, entry in perplexities(evaluation.result):
            relative = entry["ppl"] / baseline[source]["ppl"]
            rows.append(
                (
                    evaluation.name,
                    "" if bits is None else f"{bits:.3f}",
                    megabytes(evaluation.file_bytes),
                    f"{entry['ppl']:.2f}",
                    f"{relative:.2f}×",
                )
            )
    entry = perplexities(results.evaluations[0].result)[0][1]
    return [
        "<h2>How much worse it predicts text</h2>",
        page.table(("model", "bits", "file", "perplexity", "relative"), rows, numbers=(1, 2, 3, 4)),
        page.paragraph(
            "Perplexity is how many tokens the model is, so to speak, undecided between at every step; lower is "
            f"better. Measured on {entry['tokens']:,} tokens in windows of {entry['seqlen']}, of text that was not "
            "used for calibration.",
            "note",
        ),
    ]


def _samples(results: ModelResults) -> list[str]:
    pairs = (
        f'<p class="sample"><b>{escape(sample.prompt)}</b> …</p><div class="pair">'
        f'<div><h3>original</h3><p class="sample">{escape(sample.original)}</p></div>'
        f'<div><h3>packed</h3><p class="sample">{escape(sample.packed)}</p></div></div>'
        for sample in results.samples
    )
    return [
        "<h2>What they write</h2>",
        page.paragraph("Both models continue the same prompts, always with their likeliest token. Unedited.", "note"),
        *pairs,
    ]


def _commands(results: ModelResults) -> list[str]:
    seconds, peak = results.quantize["seconds"], results.quantize["peak_rss_bytes"]
    return [
        "<h2>How to repeat it</h2>",
        page.paragraph(f"Quantization took {seconds / 60:.1f} minutes and {peak / 1e9:.1f} GB of memory.", "note"),
        f"<pre><code>{escape(chr(10).join(results.commands))}</code></pre>",
    ]
