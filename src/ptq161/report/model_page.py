"""The page about one packed model: what it weighs, what quantizing it lost, what it says; for readers of no paper."""

from html import escape

from ptq161.report import page
from ptq161.report.explanations import (
    EXPLANATIONS,
    distillation_in_words,
    learning_in_words,
    objective_in_words,
    widths_in_words,
)
from ptq161.report.figures import (
    bits_figure,
    channels_figure,
    corner_figure,
    learning_figure,
    loss_figure,
    storage_figure,
)
from ptq161.report.palette import WHOLE, part
from ptq161.report.results import ModelResults


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
            *_distillation(results),
            *_channels(results),
            *_perplexity(results),
            *_samples(results),
            *_commands(results),
        ],
    )


def megabytes(size: int) -> str:
    """Bytes as millions of bytes."""
    return f"{size / 1e6:.1f} MB"


def _summary(results: ModelResults) -> list[str]:
    inspected, first, last = results.inspect, results.evaluations[0], results.evaluations[-1]
    (_, before), (_, after) = first.perplexities[0], last.perplexities[0]
    left = inspected["dense_linears"]
    untouched = f" ({left} linear layers were left as they are)" if left else ""
    tuned = (results.quantize["distillation"] or {}).get("kept", False)
    at_last = " In the end it was tuned as a whole to predict what the original predicts." if tuned else ""
    return [
        page.paragraph(
            f"Every weight of {inspected['quantized_linears']} linear layers of this language model was replaced by "
            f"little more than its sign{untouched}. {EXPLANATIONS[results.method].in_short}{at_last} This page shows "
            "what that saved and what it cost."
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
    corner, explanation = results.corner, EXPLANATIONS[results.method]
    last = corner.first_channel + len(corner.widths) - 1
    return [
        "<h2>What a weight becomes</h2>",
        page.paragraph(
            "A linear layer multiplies its inputs with a matrix: one column for each input channel, one row for each "
            f"output. {explanation.ranking} {widths_in_words(results.width_shares)} {explanation.factors}"
        ),
        page.figure(
            "corner",
            lambda width: corner_figure(corner, width),
            f"Weights of {corner.linear}: columns of plus and minus signs, zeros and numbers from -15 to 15.",
            f"The first rows of {corner.linear}, channels {corner.first_channel} to {last} (fewer on a narrow screen), "
            "as they lie in the file. Strong colours are positive, faint ones negative.",
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
            f"All bytes stored because of quantization, over {weights:,} weights: codes with their padding, scale "
            f"factors, and which channel has which width.{formula}",
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
            "The model is quantized one decoder block at a time, so that the block's output on the calibration text "
            f"comes close to that of the original block. {learning_in_words(results.config)}"
        ),
        page.figure(
            "loss",
            lambda width: loss_figure(blocks, width),
            f"Loss of {len(blocks)} blocks at the start and as stored. {verdict}",
            f"{objective_in_words(results.config)}; added up for two targets: what the original block gives on the "
            f"original model's states and on the quantized model's. {verdict}",
        ),
    ]


def _distillation(results: ModelResults) -> list[str]:
    record = results.quantize["distillation"]
    if record is None:
        return []
    said = ["<h2>The model as a whole</h2>", page.paragraph(distillation_in_words(record))]
    if not record.get("curve"):  # it was skipped, or the record is older than the curve
        return said
    change = f"{record['held_out_first']:.3f} to {record['held_out_last']:.3f}"
    return [
        *said,
        page.figure(
            "learning",
            lambda width: learning_figure(record, width),
            f"Divergence while {record['tokens']:,} tokens were learned from; on held-out samples from {change}.",
            "Each stretch of the line is the mean over some steps, on text as it was read; text that is read again is "
            "easier than what is held out.",
        ),
    ]


def _channels(results: ModelResults) -> list[str]:
    columns = 8 * results.inspect["parts"]["columns"] / results.inspect["quantized_weights"]
    measured = EXPLANATIONS[results.method].channels.format(measure=results.channels[0].measure)
    return [
        "<h2>Which channels get more bits</h2>",
        page.figure(
            "channels",
            lambda width: channels_figure(results.channels, width),
            "Importance of every input channel in "
            + ", ".join(f"block {shown.block} {shown.linear}" for shown in results.channels)
            + "; the more important, the more bits.",
            f"{measured} The highest get the most bits. Whole columns are chosen, not single weights: that is why it "
            f"costs next to nothing to say which, {columns:.4f} bits per weight.",
        ),
    ]


def _perplexity(results: ModelResults) -> list[str]:
    baseline = dict(results.evaluations[0].perplexities)
    rows = []
    for evaluation in results.evaluations:
        bits = evaluation.result["bits_per_weight"]
        for source, entry in evaluation.perplexities:
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
    entry = results.evaluations[0].perplexities[0][1]
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
