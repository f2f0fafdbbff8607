"""Results on stdout, when a command is done: tables and lines. Numbers come in ready; nothing is decided here."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.table import Table

from ptq161.terminal import duration, optional, size


def figures_table(rows: Mapping[str, str]) -> Table:
    """Two columns: what, and how much."""
    table = Table(show_header=False)
    for name, figure in rows.items():
        table.add_row(name, figure)
    return table


def numbers_table(name: str, *columns: str) -> Table:
    """A first column of names, then numbers, aligned right."""
    table = Table(name)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _budget_rows(result: Mapping[str, Any]) -> dict[str, str]:
    return {
        "honest bits per weight": optional(result["bits_per_weight"]),
        "the paper's formula": optional(result["paper_bits"]),
        "channels kept at 4 bits": f"{result['salient_ratio']:.2%}",
        "quantized weights": f"{result['quantized_weights']:,}",
        "linears left dense": str(result["dense_linears"]),
        "embedding and head": size(result["embedding_bytes"] + result["head_bytes"]) + _vocabulary_bits(result),
    }


def _vocabulary_bits(result: Mapping[str, Any]) -> str:
    bits = result["vocabulary_bits"]
    return "" if bits is None else f", int8: {bits:.2f} bits per weight, counted apart"


def show_quantized(out: Console, result: Mapping[str, Any], source_bytes: int | None, next_commands: list[str]) -> None:
    """The summary after `quantize`."""
    source = "" if source_bytes is None else f" (source: {size(source_bytes)})"
    rows = _budget_rows(result) | {
        "weight files": size(result["file_bytes"]) + source,
        "time": duration(result["seconds"]),
        "peak memory": size(result["peak_rss_bytes"]),
    }
    out.print(figures_table(rows))
    table = numbers_table("block", "loss at the start", "as stored", "change", "time")
    for block in result["blocks"]:
        first, last = block["loss_first"], block["loss_last"]
        change = f"{last / first - 1:+.1%}" if first else "-"
        table.add_row(str(block["index"]), f"{first:.5g}", f"{last:.5g}", change, duration(block["seconds"]))
    out.print(table)
    worse = [str(block["index"]) for block in result["blocks"] if not block["loss_last"] < block["loss_first"]]
    if worse:
        out.print(f"warning: the stored loss is not below its start in block {', '.join(worse)}")
    _show_distillation(out, result["distillation"])
    for command in next_commands:
        out.print(f"next: {command}")


def _show_distillation(out: Console, record: Mapping[str, Any] | None) -> None:
    if record is None:
        return
    if "skipped" in record:
        out.print(f"warning: no distillation, the blocks stay as they are: it {record['skipped']}")
        return
    change = f"{record['held_out_first']:.4f} -> {record['held_out_last']:.4f}"
    effort = f"{record['steps']} steps, {record['tokens']:,} tokens, {duration(record['seconds'])}"
    out.print(f"distillation: {effort}; divergence on held-out samples {change}")
    if not record["kept"]:
        out.print("warning: distillation ended no better than it began; the blocks stay as they were before it")


def show_plan(out: Console, result: Mapping[str, Any]) -> None:
    """What `quantize --dry-run` found out."""
    rows = _budget_rows(result) | {
        "weight files": size(result["file_bytes"]),
        "weights": "read whole into memory" if result["weights_in_memory"] else "read block by block",
        "peak memory, about": size(result["peak_memory_bytes"]),
        "disk, while it runs": size(result["disk_bytes"]),
        **({} if result["offload_bytes"] is None else {"disk of --offload": size(result["offload_bytes"])}),
        "work in the linears": f"{result['flops']:.2e} floating-point operations",
    }
    out.print(figures_table(rows))


STAGES = {
    "original": "original",
    "quantized": "original, quantized",
    "preprocessed": "preprocessed",
    "preprocessed_quantized": "preprocessed, quantized",
}


def show_preprocessed(out: Console, result: Mapping[str, Any], model_command: str | None) -> None:
    """The summary after `preprocess`."""
    losses, spread = result["losses"], result["concentration"]
    rows = {
        "linears with an adapter": str(result["targets"]),
        "tokens learned from": f"{result['tokens']:,} ({result['distinct_tokens']:,} different)",
        "loss, first and last tenth": f"{losses[0]:.4f}, {losses[-1]:.4f}",
        "time": duration(result["seconds"]),
        "peak memory": size(result["peak_rss_bytes"]),
    }
    for stage in spread:
        rows[f"salient weights in a tenth of the channels, {STAGES[stage]}"] = f"{spread[stage]:.1%}"
    out.print(figures_table(rows))
    if result["perplexity"]:
        table = numbers_table("perplexity of", *STAGES.values())
        for source, found in result["perplexity"].items():
            table.add_row(source, *(optional(found[stage]["ppl"]) for stage in STAGES))
        out.print(table)
    if model_command is not None:
        out.print(f"next: {model_command}")


def show_evaluated(out: Console, result: Mapping[str, Any]) -> None:
    """Perplexities, one row per text; metrics of tasks, one row each."""
    table = numbers_table("text", "perplexity", "tokens", "windows", "of length", "BOS")
    for source, entry in (result["perplexity"] or {}).items():
        counts = (
            f"{entry['tokens']:,}",
            str(entry["windows"]),
            str(entry["seqlen"]),
            "no" if entry["bos"] is None else "yes",
        )
        table.add_row(source, optional(entry["ppl"]), *counts)
    if result["perplexity"]:
        out.print(table)
    if result["tasks"]:
        _show_tasks(out, result["tasks"])
    bits = "dense" if result["bits_per_weight"] is None else f"{result['bits_per_weight']:.4f} bits per weight"
    out.print(f"{result['model']}: {bits}, {duration(result['seconds'])}, {size(result['peak_rss_bytes'])} of memory")


def show_compared(out: Console, result: Mapping[str, Any]) -> None:
    """One line per row of a comparison, and why some have no figures."""
    rows = result["rows"]
    texts = list(rows[0]["perplexity"])
    names = (f"perplexity, {PurePath(text).name}" for text in texts)
    table = numbers_table("method", "claimed bits", "honest bits", *names, "time")
    table.columns[0].no_wrap = True
    for row in rows:
        measured = row["perplexity"] or {}
        ppl = (optional(measured[text]["ppl"], ",.2f") if text in measured else row["status"] for text in texts)
        bits = (optional(row[key], ".3f") for key in ("claimed_bits", "bits_per_weight"))
        seconds = "-" if row["seconds"] is None else duration(row["seconds"])
        name = row["method"] if row["preprocessing"] is None else f"{row['method']}, preprocessed"
        table.add_row(name, *bits, *ppl, seconds)
    out.print(table)
    for row in rows:
        if row["status"] != "ok":
            out.print(f"{row['method']} {row['status']}: {row['reason']}")
        if padding := (row["bits_by_part"] or {}).get("padding"):
            share = f"{padding / row['quantized_weights']:.3f}"
            out.print(f"{row['method']} is padded: {share} of its honest bits are zeros that fill up blocks")
    out.print(f"next: ptq161 report {result['out']}")


def _show_tasks(out: Console, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    table = numbers_table("task", "metric", "value", "standard error", "items", "examples", "BOS")
    for name, entry in tasks.items():
        settings = (str(entry["n"]), str(entry["shots"]), "yes" if entry["bos"] else "no")
        for metric in (key for key in entry if f"{key}_stderr" in entry):
            table.add_row(name, metric, optional(entry[metric]), optional(entry[f"{metric}_stderr"]), *settings)
    out.print(table)


def show_inspected(out: Console, path: str, result: Mapping[str, Any]) -> None:
    """Bits, bytes by part, and the distinct linears."""
    stored, file_bytes = sum(result["parts"].values()), result["file_bytes"]
    table = numbers_table("in the files", "bytes", "share", "bits/weight")
    for name, count in result["parts"].items():
        bits = 8 * count / result["quantized_weights"]
        table.add_row(name, f"{count:,}", f"{count / file_bytes:.1%}", f"{bits:.4f}")
    table.add_section()
    table.add_row("linears", f"{stored:,}", f"{stored / file_bytes:.1%}", f"{result['bits_per_weight']:.4f}")
    rest = result["other_bytes"] - result["embedding_bytes"] - result["head_bytes"]
    int8 = "" if result["vocabulary_bits"] is None else " (int8)"
    head = f"head{int8}" if result["head_bytes"] else "head (tied: the embedding)"
    others = {f"embedding{int8}": result["embedding_bytes"], head: result["head_bytes"], "everything else": rest}
    for name, count in (others | {"file headers": result["header_bytes"]}).items():
        table.add_row(name, f"{count:,}", f"{count / file_bytes:.1%}", "")
    table.add_section()
    table.add_row("files", f"{file_bytes:,}", "100.0%", "")
    out.print(f"{path} ({'measured' if result['measured'] else 'predicted'})")
    out.print(table)
    layers = numbers_table("linears", "rows", "cols", "input channels", "bits/weight", "paper's formula")
    for layer in result["layers"]:
        shape = (str(layer["linears"]), str(layer["rows"]), str(layer["cols"]))
        columns = ", ".join(f"{count} of {width}" for width, count in layer["columns"].items())
        layers.add_row(*shape, columns, f"{layer['bits_per_weight']:.4f}", optional(layer["paper_bits"]))
    out.print(layers)
    rows = _budget_rows(result) | {
        "linears at fp16": f"{size(result['linears_fp16_bytes'])}, {result['times_smaller']:.2f} times as large",
        "weight files": size(file_bytes),
    }
    out.print(figures_table(rows))
    quoted = result["paper_table_13"]
    if quoted is not None:
        out.print(
            f"The paper's Table 13 has {size(int(quoted['bytes']))} for {quoted['model']} (rule not published); "
            f"here the linears take {size(stored)}, the files {size(file_bytes)}."
        )


def show_problems(out: Console, problems: Sequence[Mapping[str, Any]]) -> None:
    """What `verify` found, one line each."""
    for problem in problems:
        where = problem["file"] if problem["tensor"] is None else f"{problem['file']}: tensor {problem['tensor']}"
        out.print(f"{where}: {problem['what']}")


def show_shape_speed(out: Console, result: Mapping[str, Any]) -> None:
    """Products with one linear: one row per contender and number of tokens."""
    rows, cols = result["shape"]
    table = numbers_table(
        "weights", "tokens", "median µs", "p10 µs", "CPU µs", "GFLOP/s", "GB/s of the file", "of memory"
    )
    for row in result["measured"]:
        rates = (optional(row[key], ".1f") for key in ("gb_s", "memory_gb_s"))
        times = (
            f"{row['median_us']:.1f}",
            f"{row['p10_us']:.1f}",
            optional(row["cpu_us"], ".1f"),
            optional(row["gflop_s"], ".0f"),
        )
        table.add_row(row["weights"], str(row["tokens"]), *times, *rates)
    weights = "cold" if result["cold_bytes"] else "hot"
    out.print(f"{rows} x {cols}, {result['format']} format, {_where(result)}, weights {weights}")
    out.print(table)
    _show_speedup(out, result)


def show_model_speed(out: Console, result: Mapping[str, Any]) -> None:
    """A whole model: one row per contender."""
    table = numbers_table("weights", "prompt", "prefill tokens/s", "decode tokens/s", "by CPU time: prefill", "decode")
    for row in result["measured"]:
        keys = ("prefill_tok_s", "decode_tok_s", "prefill_cpu_tok_s", "decode_cpu_tok_s")
        numbers = (optional(row[key], ".1f") for key in keys)
        table.add_row(row["weights"], str(row["prompt_tokens"]), *numbers)
    out.print(f"{result['model']}, {_where(result)}, {result['new_tokens']} new tokens after each prompt")
    out.print(table)
    file = result["file_bytes"]
    resident, peak = (result[key] for key in ("resident_bytes", "load_peak_bytes"))
    memory = "" if resident is None else f"; {size(resident)} resident ({resident / file:.2f} of the file)"
    highest = "" if peak is None else f", {peak / file:.2f} at the highest while loading"
    seconds, linears = duration(result["load_seconds"]), size(result["weight_bytes"])
    out.print(f"loaded in {seconds}{memory}{highest}; packed linears: {linears}")
    for name, speedup in result["speedups"].items():
        out.print(f"packed decodes {speedup:.1f} times as fast as {name} with the same head")


def _where(result: Mapping[str, Any]) -> str:
    kernel = result["kernels"][0] if result["kernels"] else "no"
    return f"{kernel} kernel, {result['threads']} thread{'s' * (result['threads'] > 1)}"


def _show_speedup(out: Console, result: Mapping[str, Any]) -> None:
    if result["speedup"] is not None:
        out.print(f"packed decodes {result['speedup']:.1f} times as fast as the faster dense one")
