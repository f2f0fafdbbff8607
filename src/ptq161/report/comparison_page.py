"""The page about methods compared on one model: what each stores, loses and costs; for readers of no paper."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import PurePath

from ptq161.report import page
from ptq161.report.comparison import Comparison, Entry
from ptq161.report.drawings import drawings, task_scores

FEW_BITS = 3  # where the best of the other methods is looked for


def comparison_page(comparison: Comparison) -> str:
    """The whole page as HTML."""
    title = f"{comparison.name}: {len({entry.family.name for entry in comparison.entries})} ways to make it smaller"
    return page.document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            *_summary(comparison),
            *_bits(comparison),
            *_results(comparison),
            *_families(comparison),
            *_parts(comparison),
            *_tasks(comparison),
            *_blocks(comparison),
            *_channels(comparison),
            *_preprocessing(comparison),
            *_ablations(comparison),
            *_memory(comparison),
            *_effort(comparison),
            *_commands(comparison),
        ],
    )


def _figure(comparison: Comparison, name: str, alternative: str, caption: str) -> str:
    return page.figure(name, drawings(comparison)[name], alternative, caption)


def _text(source: str) -> str:
    """A source as a reader knows it: the file's name and range, not where it lies."""
    return PurePath(source).name


def _short(source: str) -> str:
    """The same without range and ending, for the head of a column."""
    return _text(source).partition("[")[0].partition(".")[0].replace("_", " ")


def _summary(comparison: Comparison) -> Iterator[str]:
    text = comparison.texts[0]
    samples = ", ".join(f"{count:,} tokens of {_text(source)}" for source, count in _calibration(comparison).items())
    yield page.paragraph(
        "A language model is mostly matrices of weights, 16 bits each. The methods below store them in fewer bits. All "
        f"started from the same model, {comparison.name}, saw the same calibration text ({samples}) and were measured "
        "on the same text that none had seen. What counts is how little they lose, and how many bits storing their "
        "result really takes: scales, masks and indices included."
    )
    tiles = [(f"{comparison.original_ppl(text):.1f}", "perplexity at full precision (lower is better)")]
    ours = [entry for entry in comparison.entries if entry.family.ours]
    others = [entry for entry in comparison.entries if not entry.family.ours and (_bits_of(entry) or 16) < FEW_BITS]
    for kind, entry in (("this package's best", ours[:1]), (f"best other below {FEW_BITS} bits", others[:1])):
        for chosen in entry:
            ppl, bits = chosen.ppl(text) or 0.0, _bits_of(chosen) or 0.0
            tiles.append((_number(ppl), f"{kind}: {chosen.label} at {bits:.2f} bits"))
    yield page.tiles(tiles)


def _calibration(comparison: Comparison) -> Mapping[str, int]:
    row = next((entry.row for entry in comparison.entries if entry.row.get("calib")), comparison.original)
    return row.get("calib") or {}


def _bits(comparison: Comparison) -> Iterator[str]:
    yield "<h2>Bits against loss</h2>"
    for index, text in enumerate(comparison.texts, start=1):
        measured = comparison.original["perplexity"][text]
        yield _figure(
            comparison,
            f"bits-{index}",
            "Bits per weight against perplexity: "
            + "; ".join(f"{e.label} {e.row['bits_per_weight']:.2f} bits" for e in comparison.entries if _bits_of(e)),
            f"{_text(text)}, {measured['windows']} windows of {measured['seqlen']} tokens; numbers are those of the "
            "table. Down and to the left is better. The distance between a hollow and its filled dot is what the "
            "authors' count leaves out.",
        )


def _bits_of(entry: Entry) -> float | None:
    bits: float | None = entry.row["bits_per_weight"]
    return bits


def _results(comparison: Comparison) -> Iterator[str]:
    header = ["", "method", "claimed", "honest bits"]
    for text in comparison.texts:
        header += [_short(text), "×"]
    originals = [comparison.original_ppl(text) for text in comparison.texts]
    rows = [["", "full precision", "", "", *(part for ppl in originals for part in (f"{ppl:.2f}", "1"))]]
    for entry in comparison.entries:
        cells = [
            str(entry.number),
            entry.label,
            _optional(entry.row["claimed_bits"]),
            _optional(entry.row["bits_per_weight"]),
        ]
        for text, original in zip(comparison.texts, originals, strict=True):
            ppl = entry.ppl(text)
            cells += ["-", "-"] if ppl is None else [_number(ppl), _number(ppl / original)]
        rows.append(cells)
    yield "<h2>Perplexity</h2>"
    yield page.table(header, rows, numbers=range(2, len(header)), totals=(0,))
    yield page.paragraph(
        "Perplexity is how many tokens the model is, so to speak, undecided between at every step; × is that over full "
        "precision's. Settings stand behind the name: w2 are codes of 2 bits, g128 a scale and zero for every 128 "
        "channels of a row, a4 activations of 4 bits. Above a few thousand nothing is left of the model.",
        "note",
    )
    for row in comparison.left_out:
        yield page.paragraph(f"{row['method']} {row['status']}: {row['reason']}", "warning")


def _families(comparison: Comparison) -> Iterator[str]:
    families = {entry.family.name: entry.family for entry in comparison.entries}
    yield "<h2>What they do</h2>"
    yield page.table(("method", "in short"), [(family.name, family.what) for family in families.values()])


def _parts(comparison: Comparison) -> Iterator[str]:
    if "parts" in drawings(comparison):
        counted = [entry for entry in comparison.entries if entry.row.get("bits_by_part")]
        yield "<h2>What the bits are spent on</h2>"
        yield _figure(
            comparison,
            "parts",
            "Bits per weight: " + "; ".join(f"{e.label} {e.row['bits_per_weight']:.3f}" for e in counted),
            "Codes say which of a few values a weight has. A mask that may pick any single weight costs a whole bit "
            "for each; one that picks channels costs next to nothing.",
        )


def _tasks(comparison: Comparison) -> Iterator[str]:
    scores = task_scores(comparison)
    if not scores:
        return
    yield "<h2>Tasks</h2>"
    yield _figure(
        comparison,
        "tasks",
        "Scores by task",
        "Share of right answers, one standard error to each side; the original in black.",
    )
    rows = [(task, name, f"{score:.3f} ± {error:.3f}") for task, of in scores.items() for name, score, error in of]
    yield page.table(("task", "model", "score"), rows, numbers=(2,))


def _blocks(comparison: Comparison) -> Iterator[str]:
    if "blocks" in drawings(comparison):
        yield "<h2>Block by block</h2>"
        yield _figure(
            comparison,
            "blocks",
            "Error of the hidden states after every decoder block.",
            "How far the model's inner states are from the original's after each decoder block, on held-out text: mean "
            "squared error over mean square, token by token. At 1 nothing is left of them. Grey: the other methods.",
        )


def _channels(comparison: Comparison) -> Iterator[str]:
    found = drawings(comparison)
    if "channels" in found:
        yield "<h2>Why some channels get more bits</h2>"
        yield _figure(
            comparison,
            "channels",
            "Mean magnitude of inputs and weights of every channel in some layers.",
            "Weights are much alike in all channels of a layer, the values that reach them are not: an error in a loud "
            "channel counts for more. That is why PTQ1.61 keeps whole channels at 4 bits.",
        )
    for name in comparison.maps:
        yield _figure(
            comparison,
            f"map-{name}",
            f"Which channels of each block's first layer have how many bits: {name}.",
            f"{name}: the first linear layer of every decoder block. Channels with more bits line up from block to "
            "block where the same ones are loud everywhere.",
        )


def _preprocessing(comparison: Comparison) -> Iterator[str]:
    if comparison.salient:
        yield "<h2>What preprocessing moves</h2>"
        yield _figure(
            comparison,
            "salient",
            "Where the largest weights of three layers lie in the original, once quantized, and preprocessed.",
            "The largest 5 % of the weights of three layers; the darker, the more of them. Rows are input channels. "
            "Where they line up in rows, keeping whole channels at 4 bits keeps most of them.",
        )


def _ablations(comparison: Comparison) -> Iterator[str]:
    for file, rows in comparison.ablations.items():
        texts = list(dict.fromkeys(text for row in rows for text in row["perplexity"]))
        originals = rows[0]["perplexity"]
        cells = [
            [
                row["variant"],
                _optional(row.get("bits_per_weight")),
                *(_number(row["perplexity"][text]["ppl"]) for text in texts),
                *(_number(row["perplexity"][text]["ppl"] / originals[text]["ppl"]) for text in texts),
            ]
            for row in rows
        ]
        header = ["variant", "bits", *map(_short, texts), *("×" for _ in texts)]
        yield "<h2>One thing changed at a time</h2>"
        yield page.table(header, cells, numbers=range(1, len(header)))
        yield page.paragraph(f"{PurePath(file).name}; × is over the first row.", "note")


def _memory(comparison: Comparison) -> Iterator[str]:
    if not comparison.memory:
        return
    formats = list(next(iter(comparison.memory.values())))
    rows = [(model, *(f"{size[name] / 1e9:.2f}" for name in formats)) for model, size in comparison.memory.items()]
    yield "<h2>Larger models</h2>"
    yield page.table(("model", *formats), rows, numbers=range(1, len(formats) + 1))
    yield page.paragraph(
        "Gigabytes of the whole model, from the shapes of its layers: linears in the format, all else at 16 bits. The "
        "paper's Table 13 has 1.41 GB for PTQ1.61, 1.83 for BiLLM and 2.36 for PB-LLM on a 7B model, by a rule that it "
        "does not give.",
        "note",
    )


def _effort(comparison: Comparison) -> Iterator[str]:
    if "effort" in drawings(comparison):
        threads = comparison.original.get("threads")
        yield "<h2>What it takes</h2>"
        yield _figure(
            comparison,
            "effort",
            "Minutes that quantizing took, by method.",
            f"Time to quantize with {threads} thread{'s' * (threads != 1)}, and the process' memory at its highest, "
            "the original included. Times are of the machine as it was; a run that was interrupted has none.",
        )


def _commands(comparison: Comparison) -> Iterator[str]:
    original = comparison.original
    commands = dict.fromkeys(row.get("command") for row in (original, *(entry.row for entry in comparison.entries)))
    versions = {"ptq161": original.get("version"), **(original.get("versions") or {})}
    notes = [f"{name} {version}" for name, version in versions.items() if version]
    notes += [f"{key} {original[key]}" for key in ("seed", "dtype") if original.get(key) is not None]
    yield "<h2>How to repeat it</h2>"
    yield f"<pre><code>{escape(chr(10).join(filter(None, commands)))}</code></pre>"
    yield page.paragraph(", ".join(notes), "note")


def _number(value: float) -> str:
    """Three digits that count, or whole numbers with separators."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
