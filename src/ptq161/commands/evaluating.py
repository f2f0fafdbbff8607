"""Commands that measure how good models are: eval, compare, report."""

import json
import shlex
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq161.commands.common import dtype_of, opened_model, require, show_result, torchrun_rank
from ptq161.commands.rows import append_row, recorded
from ptq161.errors import InputError
from ptq161.options import compare_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ptq161.compare import MeasureTasks


def eval_command(args: Namespace) -> int:
    """Perplexity and tasks of one model."""
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: its folder does not exist; make it, or choose another file")
    if not args.ppl and not args.tasks:
        raise InputError("eval needs something to measure: --ppl SOURCE, --tasks NAMES, or both")
    began = time.monotonic()
    from ptq161 import data, machine, meters, ranks, tables, terminal
    from ptq161.evaluate.perplexity import perplexity
    from ptq161.hf import is_packed
    from ptq161.inspection import inspect

    with terminal.quiet_libraries(debug=args.debug), ranks.joined(args.device):
        with ranks.first_goes_first():
            for source in args.ppl:
                data.parse_source(source)
            measure_tasks = _tasks(args)
            record = recorded(Path(args.path)) if is_packed(args.path) else ({}, {})
            model, tokenizer = opened_model(args)
            if args.bos and tokenizer.bos_token_id is None:
                raise InputError(f"--bos: the tokenizer of {args.path} has no BOS token; leave --bos out")
            bos = tokenizer.bos_token_id if args.bos else None
            texts = {source: data.evaluation_tokens(source, tokenizer) for source in args.ppl}
        measured = {}
        for source, tokens in texts.items():
            meter = meters.EvaluationMeter(source, "window", quiet=args.quiet or not ranks.first())
            with meter:
                measured[source] = perplexity(
                    model, tokens, args.seqlen, bos=bos, max_windows=args.max_windows, on_window=meter
                )
        tasks = None
        if measure_tasks is not None:
            meter = meters.EvaluationMeter("tasks", "request", quiet=args.quiet or not ranks.first())
            with meter:
                tasks = ranks.from_first(lambda: measure_tasks(model, tokenizer, meter))
        sizes = inspect(args.path) if is_packed(args.path) else None
    result = {
        "model": args.path,
        "bits_per_weight": None if sizes is None else sizes["bits_per_weight"],
        "perplexity": measured or None,
        "tasks": tasks,
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": machine.peak_rss_bytes(),
    }
    if args.out is not None and not torchrun_rank():
        append_row(args, result, sizes, record)
    return show_result(args, result, lambda out: tables.show_evaluated(out, result))


def compare_command(args: Namespace) -> int:
    """Methods side by side."""
    settings = compare_settings(args)
    import torch

    from ptq161 import compare, comparison_inputs, machine, meters, tables, terminal

    device = machine.pick_device(args.device)
    fast = torch.bfloat16 if machine.multiplies_bfloat16(device) else torch.float32
    meter = meters.CompareMeter(quiet=args.quiet)
    with terminal.quiet_libraries(debug=args.debug), meter:
        meter.line(f"reading {args.model} and the texts")
        result = compare.compare(
            args.model,
            args.out,
            comparison_inputs.Settings(**settings, device=device, dtype=dtype_of(args) or fast),
            measure_tasks=_tasks(args),
            command=shlex.join(["ptq161", *args.arguments]),
            restart=args.restart,
            on_step=meter,
        )
    return show_result(args, result, lambda out: tables.show_compared(out, result))


def report_command(args: Namespace) -> int:
    """The page of a comparison."""
    require("report", "matplotlib")
    from ptq161 import shapes, terminal
    from ptq161.before_after import SALIENT_MAPS
    from ptq161.comparison_inputs import CHANNELS, MODELS, RESULTS
    from ptq161.evaluate.channels import width_map
    from ptq161.hf import is_packed
    from ptq161.report import comparison, writing

    rows = comparison.read_rows(args.path / RESULTS, comparison.RESULT_COLUMNS)
    ablations = {str(file): comparison.read_rows(file, comparison.ABLATION_COLUMNS) for file in args.ablations}
    channels = args.path / CHANNELS
    folders = [folder for folder in sorted((args.path / MODELS / "original").glob("*")) if is_packed(folder)]
    preprocessed = [Path(row["preprocessing"], SALIENT_MAPS) for row in rows if row["preprocessing"] is not None]
    salient: list[dict[str, Any]] = next((json.loads(path.read_text()) for path in preprocessed if path.exists()), [])
    with terminal.quiet_libraries(debug=args.debug):
        results = comparison.arranged(
            rows,
            args.path / RESULTS,
            ablations=ablations,
            channels=json.loads(channels.read_text()) if channels.exists() else [],
            maps={folder.name: width_map(folder) for folder in folders},
            salient=salient,
            memory=shapes.memory_table(),
        )
        result = writing.write_report(results, args.path)
    return show_result(args, result, lambda out: out.print(f"open {result['page']}"))


def _tasks(args: Namespace) -> "MeasureTasks | None":
    """What measures the tasks, their data read already so that a bad file is refused before a model is opened."""
    if not args.tasks:
        return None
    require("tasks", "lm_eval")
    from ptq161.evaluate import tasks

    settings = tasks.TaskSettings(limit=args.limit, shots=args.shots, seed=args.seed, bos=args.bos)
    loaded = tasks.load_tasks(args.tasks, args.task_data, settings)

    def measure(
        model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", on_request: Callable[[int, int], None]
    ) -> dict[str, Any]:
        results = tasks.evaluate_tasks(model, tokenizer, loaded, settings, on_request=on_request)
        return {result.task: result.row() for result in results}

    return measure
