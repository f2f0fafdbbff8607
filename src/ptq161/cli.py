"""The command line: parses arguments, calls the library, prints what it returned.

Results go to stdout (one JSON object with --json), everything else to stderr. Heavy imports live inside the command
bodies, so that `--help` and a mistyped argument answer at once. Exit codes: 0 done, 1 failed while running, 2 bad
arguments or input, 130 interrupted.
"""

import json
import os
import shlex
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptq161
from ptq161.arguments import compare_settings, parse, preprocess_settings, quantize_settings
from ptq161.config import Head, QuantConfig
from ptq161.errors import FailedElsewhere, InputError, Ptq161Error

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ptq161.compare import MeasureTasks
    from ptq161.generation import Sampling


# What an interruption leaves, by command.
KEPT = {
    "quantize": "; finished blocks are kept, the same command continues",
    "compare": "; finished rows are kept, the same command continues",
    "preprocess": "; what was done is kept (training: up to its last checkpoint), the same command continues",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; on failure the last line on stderr says why."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parse(arguments)
        if _rank() is not None and args.command not in SHARED:
            raise InputError(f"torchrun can run {' and '.join(SHARED)}; start {args.command} without it")
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        kept = "".join(KEPT.get(command, "") for command in arguments[:1])
        return 130 if _rank() else _fail(f"interrupted{kept}", 130)
    except FailedElsewhere as error:
        return error.exit_code
    except Ptq161Error as error:
        _debug(arguments)
        return _fail(str(error), error.exit_code)
    except Exception as error:
        _debug(arguments)
        hint = "" if "--debug" in arguments else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1)


def _fail(message: str, status: int) -> int:
    where = f"rank {_rank()}: " if _rank() else ""
    print(f"ptq161: error: {where}{' '.join(message.split())}", file=sys.stderr)
    return status


def _rank() -> int | None:
    """The number of this process among those that torchrun started; None without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _debug(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()


def _quantize(args: Namespace) -> int:
    keywords = quantize_settings(args) | {"blocks": args.blocks, "device": args.device, "dtype": args.dtype}
    keywords["offload"] = args.offload
    from ptq161 import meters, pipeline, ranks, tables, terminal

    with terminal.quiet_libraries(debug=args.debug), ranks.joined(args.device):
        if args.dry_run:
            plan = pipeline.plan(args.model, **keywords)
            return _print(args, plan, lambda out: tables.show_plan(out, plan))
        meter = meters.QuantizeMeter(quiet=args.quiet or not ranks.first())
        with meter:
            meter.line(f"reading {args.model} and the calibration text")
            if ranks.count() > 1:
                meter.line(
                    f"{ranks.count()} ranks share the samples; steps of one sample (batch_size=1) are not shared"
                )
            result = pipeline.quantize(
                args.model, args.out, overwrite=args.overwrite, restart=args.restart, on_progress=meter, **keywords
            )
    out = shlex.quote(args.out)
    hints = [f"ptq161 eval {out} --ppl FILE", f"ptq161 generate {out} --prompt TEXT"]
    source = _weight_bytes(args.model)
    return _print(args, result, lambda c: tables.show_quantized(c, result, source, [] if args.quiet else hints))


def _preprocess(args: Namespace) -> int:
    keywords = preprocess_settings(args)
    _require("preprocess", "peft")
    if args.maps is not None:
        _require("report", "matplotlib")
        if not args.maps.absolute().parent.is_dir():
            raise InputError(f"--maps {args.maps}: its folder does not exist; make it, or choose another file")
    from ptq161 import meters, tables, terminal
    from ptq161.preprocess import SALIENT_MAPS, preprocess

    names = ("text", "quantized", "preset", "calib", "ppl", "ppl_seqlen", "max_windows")
    keywords |= {name: getattr(args, name) for name in (*names, "device", "dtype", "overwrite", "restart")}
    with terminal.quiet_libraries(debug=args.debug):
        meter = meters.QuantizeMeter(quiet=args.quiet)
        with meter:
            meter.line(f"reading {args.model} and the text")
            result = preprocess(args.model, args.out, on_progress=meter, **keywords)
    if args.maps is not None:
        from ptq161.report.maps import maps_figure

        maps_figure(json.loads(Path(args.out, SALIENT_MAPS).read_text())).savefig(args.maps, dpi=150)
    hint = None if args.quiet else f"ptq161 quantize {shlex.quote(args.out)} OUT"
    return _print(args, result, lambda out: tables.show_preprocessed(out, result, hint))


def _eval(args: Namespace) -> int:
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
            record = _recorded(Path(args.path)) if is_packed(args.path) else ({}, {})
            model, tokenizer = _open(args)
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
    if args.out is not None and not _rank():
        _append_row(args, result, sizes, record)
    return _print(args, result, lambda out: tables.show_evaluated(out, result))


def _compare(args: Namespace) -> int:
    settings = compare_settings(args)
    import torch

    from ptq161 import compare, ground, machine, meters, tables, terminal

    device = machine.pick_device(args.device)
    fast = torch.bfloat16 if machine.multiplies_bfloat16(device) else torch.float32
    meter = meters.CompareMeter(quiet=args.quiet)
    with terminal.quiet_libraries(debug=args.debug), meter:
        meter.line(f"reading {args.model} and the texts")
        result = compare.compare(
            args.model,
            args.out,
            ground.Settings(**settings, device=device, dtype=_dtype(args) or fast),
            measure_tasks=_tasks(args),
            command=shlex.join(["ptq161", *args.arguments]),
            restart=args.restart,
            on_step=meter,
        )
    return _print(args, result, lambda out: tables.show_compared(out, result))


def _report(args: Namespace) -> int:
    _require("report", "matplotlib")
    from ptq161 import shapes, terminal
    from ptq161.evaluate.channels import width_map
    from ptq161.ground import CHANNELS, MODELS, RESULTS
    from ptq161.hf import is_packed
    from ptq161.report import comparison, writing

    rows = comparison.read_rows(args.path / RESULTS, comparison.RESULT_COLUMNS)
    ablations = {str(file): comparison.read_rows(file, comparison.ABLATION_COLUMNS) for file in args.ablations}
    channels = args.path / CHANNELS
    folders = [folder for folder in sorted((args.path / MODELS / "original").glob("*")) if is_packed(folder)]
    with terminal.quiet_libraries(debug=args.debug):
        results = comparison.arranged(
            rows,
            args.path / RESULTS,
            ablations=ablations,
            channels=json.loads(channels.read_text()) if channels.exists() else [],
            maps={folder.name: width_map(folder) for folder in folders},
            memory=shapes.memory_table(),
        )
        result = writing.write_report(results, args.path)
    return _print(args, result, lambda out: out.print(f"open {result['page']}"))


def _tasks(args: Namespace) -> "MeasureTasks | None":
    """What measures the tasks, their data read already so that a bad file is refused before a model is opened."""
    if not args.tasks:
        return None
    _require("tasks", "lm_eval")
    from ptq161.evaluate import tasks

    settings = tasks.TaskSettings(limit=args.limit, shots=args.shots, seed=args.seed, bos=args.bos)
    loaded = tasks.load_tasks(args.tasks, args.task_data, settings)

    def measure(
        model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", on_request: Callable[[int, int], None]
    ) -> dict[str, Any]:
        results = tasks.evaluate_tasks(model, tokenizer, loaded, settings, on_request=on_request)
        return {result.task: result.row() for result in results}

    return measure


def _inspect(args: Namespace) -> int:
    budget = {"bits": args.bits, "salient_ratio": args.salient_ratio}
    if budget != dict.fromkeys(budget):
        QuantConfig().replaced(budget)  # refuses what is out of range before anything heavy is loaded
    from ptq161 import inspection, tables, terminal

    with terminal.quiet_libraries(debug=args.debug):
        result = inspection.inspect(args.path, **budget, head=args.head or Head.KEEP)
    return _print(args, result, lambda out: tables.show_inspected(out, args.path, result))


def _verify(args: Namespace) -> int:
    from ptq161 import tables, terminal
    from ptq161.verify import verify

    result = verify(args.path)
    if result["ok"]:
        return _print(args, result, lambda out: out.print(f"{args.path}: every file and tensor is as it was saved"))
    if args.json:  # a list of problems is what was asked for, unlike the outcome of a command that failed
        _print(args, result, lambda out: None)
    tables.show_problems(terminal.console(stderr=True), result["problems"])
    return _fail(f"{args.path} is not a sound packed checkpoint; problems listed above: {len(result['problems'])}", 2)


def _generate(args: Namespace) -> int:
    from ptq161 import dialogue, generation, terminal

    sampling = _sampling(args)
    with terminal.quiet_libraries(debug=args.debug):
        model, tokenizer = _open(args)
        prompt = tokenizer(args.prompt)["input_ids"]
        result = generation.stream(model, tokenizer, prompt, sampling, on_text=dialogue.writer(silent=args.json))
    del result["ids"]
    dialogue.show_written(result, text=not args.json, figures=not args.json and not args.quiet)
    return _print(args, {"model": args.path, "prompt": args.prompt, **result}, lambda out: None)


def _chat(args: Namespace) -> int:
    from ptq161 import chat, dialogue, terminal

    sampling = _sampling(args)
    with terminal.quiet_libraries(debug=args.debug):
        model, tokenizer = _open(args)
        conversation = chat.Conversation(model, tokenizer, sampling, args.system)
        answers = chat.converse(
            conversation,
            read=dialogue.reader("> ", hint=None if args.quiet else chat.HINT, silent=args.json),
            on_text=dialogue.writer(silent=args.json),
            on_answer=lambda answer: dialogue.show_written(answer, text=not args.json, figures=not args.quiet),
            note=lambda text: print(text, file=sys.stderr),
        )
    return _print(args, {"model": args.path, "system": args.system, "answers": answers}, lambda out: None)


def _serve(args: Namespace) -> int:
    _require("serve", "fastapi", "openai", "uvicorn")
    from ptq161 import serve, terminal
    from ptq161.handlers import Served

    with terminal.quiet_libraries(debug=args.debug), serve.listen(args.host, args.port) as listener:
        model, tokenizer = _open(args)
        served = Served(args.name or serve.name_of(args.path), model, tokenizer)
        url = serve.url_of(listener)
        _print(args, {"model": served.name, "url": url}, lambda out: out.print(f"{served.name} answers at {url}"))
        sys.stdout.flush()
        serve.run(served, listener, access_log=not args.quiet)
    return 0


def _bench(args: Namespace) -> int:
    if (args.path is None) == (args.shape is None):
        raise InputError("bench needs either a packed folder or --shape ROWSxCOLS")
    if args.threads is not None and args.threads < 1:
        raise InputError(f"--threads {args.threads} is out of range: expected 1 or more")
    import torch

    from ptq161 import tables, terminal
    from ptq161.evaluate import model_speed, speed

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with terminal.quiet_libraries(debug=args.debug):
        if args.shape is not None:
            tokens = args.tokens or [1, 128]
            rounds = args.rounds or 40
            result = speed.bench_shape(*args.shape, tokens=tokens, rounds=rounds, format=args.format, hot=args.hot)
            return _print(args, result, lambda out: tables.show_shape_speed(out, result))
        dense = {"both": ["float32", "bfloat16"], "none": []}.get(args.dense, [args.dense])
        result = model_speed.bench_model(
            args.path,
            prompt_tokens=args.prompt_tokens or [128],
            new_tokens=args.new_tokens,
            rounds=args.rounds or 3,
            dense=dense,
        )
    return _print(args, result, lambda out: tables.show_model_speed(out, result))


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "quantize": _quantize,
    "preprocess": _preprocess,
    "eval": _eval,
    "compare": _compare,
    "report": _report,
    "inspect": _inspect,
    "verify": _verify,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "bench": _bench,
}
SHARED = ("quantize", "eval")  # what several processes can do together


def _print(args: Namespace, result: Mapping[str, Any], show: Callable[["Console"], None]) -> int:
    """Print a result on stdout, as JSON or through `show`, and return the exit code of success; rank 0 alone does."""
    from ptq161 import terminal

    if _rank():
        return 0
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        show(terminal.console())
    return 0


def _dtype(args: Namespace) -> "torch.dtype | None":
    import torch

    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def _open(args: Namespace) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model of a command and its tokenizer, kept and computed as the options say."""
    from ptq161 import machine, sources

    device = machine.pick_device(args.device)
    return sources.open_model(
        args.path, device=device, dtype=_dtype(args), mode=args.mode, activations=args.activations
    )


def _sampling(args: Namespace) -> "Sampling":
    from ptq161.generation import Sampling

    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)


def _require(extra: str, *modules: str) -> None:
    """Raises InputError if one of the modules that an extra brings is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f'this command needs {", ".join(missing)}: pip install "ptq161[{extra}]"')


def _weight_bytes(path: str) -> int | None:
    """Size of a local model's weight files; None for a name on the hub."""
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    files = list(place.glob("*.safetensors")) or list(place.glob("*.bin"))
    return sum(file.stat().st_size for file in files) if files else None


def _recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the calibration that a packed checkpoint's run.json names; empty where it has none."""
    from ptq161.folder import RUN, read_json

    if not (folder / RUN).exists():
        return {}, {}
    run = read_json(folder, RUN)
    config, calibration = run.get("config", {}), run.get("calibration", {})
    sources = calibration.get("sources", []) if isinstance(calibration, dict) else None
    if not isinstance(config, dict) or not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
        raise InputError(
            f"{folder / RUN} is not a record of ptq161 quantize; move it away, and the row goes without it"
        )
    return config, calibration


def _append_row(
    args: Namespace,
    result: Mapping[str, Any],
    sizes: Mapping[str, Any] | None,
    record: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Append one row of results.jsonl; what is not known of the model is null."""
    import torch

    config, calibration = record
    texts = calibration.get("sources", [])
    row = {
        "schema": 1,
        "model": args.path,
        "revision": None,
        "method": config.get("method"),
        "preprocessing": None,
        "config": config or None,
        # Of a mix, only the sum is recorded.
        "calib": {text: calibration.get("tokens") if len(texts) == 1 else None for text in texts} or None,
        "bits_per_weight": result["bits_per_weight"],
        "claimed_bits": None if sizes is None else sizes["paper_bits"],
        "file_bytes": _weight_bytes(args.path) if sizes is None else sizes["file_bytes"],
        "perplexity": result["perplexity"],
        "tasks": result["tasks"],
        "seconds": result["seconds"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "seed": config.get("seed"),
        "threads": torch.get_num_threads(),
        "version": ptq161.__version__,
        "command": shlex.join(["ptq161", *args.arguments]),
        "status": "ok",
        "reason": None,
    }
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
