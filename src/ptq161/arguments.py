"""The arguments of every command: what exists and what it must look like. Light: imports only settings."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import ptq161
from ptq161.config import DEFAULT_PRESET, PRESETS, Head, PreprocessConfig, unknown
from ptq161.errors import InputError
from ptq161.options import BASELINES

DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises InputError, suggesting the nearest choice, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else "command"
            raise InputError(unknown(name, str(value), map(str, action.choices)))

    def options(self) -> list[str]:
        """Every option that this parser knows."""
        return [option for action in self._actions for option in action.option_strings]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `command` is its name, `arguments` the line itself. Raises InputError.

    `--help` and `--version` print and raise SystemExit, as argparse does.
    """
    parser = _parser()
    args, left = parser.parse_known_args(arguments)
    if left:
        name, options = left[0].partition("=")[0], args.parser.options()
        nearest = [] if name in options else difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else "; options go after the command" * (name in options)
        args.parser.error(f"unknown argument {left[0]!r}{hint}")
    args.arguments = arguments
    return args


def _parser() -> _Parser:
    parser = _Parser(prog="ptq161", description=(ptq161.__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ptq161 {ptq161.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> _Parser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=name, parser=added)
        added.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        added.add_argument("--quiet", action="store_true", help="no progress and no hints")
        added.add_argument("--debug", action="store_true", help="tracebacks, and the libraries' own messages")
        return added

    _quantize_arguments(command("quantize", "quantize a model into a packed checkpoint folder"))
    _preprocess_arguments(command("preprocess", "make a dense model that quantizes better: restorative LoRA, merged"))
    _eval_arguments(command("eval", "perplexity of any model, dense or packed"))
    _compare_arguments(command("compare", "methods side by side on one model, the same tokens for all; resumable"))
    report = command("report", "one self-contained page and pictures from the results of a comparison")
    report.add_argument("path", type=Path, metavar="DIR", help="folder of a comparison, or of a results.jsonl")
    text = "a table of rows with `variant` and `perplexity`, full precision first; may be repeated"
    report.add_argument("--ablations", type=Path, action="append", default=[], metavar="ROWS.jsonl", help=text)
    inspect = command("inspect", "bits per weight and bytes by part; predicted for a model not yet packed")
    inspect.add_argument("path", metavar="PATH", help="packed folder, or config.json, HF folder, .gguf, hub name")
    _budget_arguments(inspect)
    _head_argument(inspect)
    verify = command("verify", "check every file and tensor of a packed checkpoint")
    verify.add_argument("path", metavar="DIR", help="packed folder")
    generate = command("generate", "continue a prompt, and say how fast")
    generate.add_argument("path", metavar="PATH", help="packed folder, HF folder, .gguf or hub name")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    _writing_arguments(generate, max_new_tokens=128)
    chat = command("chat", "talk with a model")
    chat.add_argument("path", metavar="PATH", help="packed folder, HF folder, .gguf or hub name")
    chat.add_argument("--system", metavar="TEXT", help="system message: what the model should be like")
    _writing_arguments(chat, max_new_tokens=1024)
    _serve_arguments(command("serve", "answer OpenAI clients over HTTP, one answer at a time"))
    _bench_arguments(command("bench", "speed of a packed model or of one shape against dense weights, on the CPU"))
    return parser


def _quantize_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name, HF folder or .gguf file")
    add("out", metavar="OUT", help="folder to be made; interrupted, the same command continues")
    add(
        "--preset",
        default=DEFAULT_PRESET,
        choices=PRESETS,
        help="; ".join(f"{k}: {v.purpose}" for k, v in PRESETS.items()),
    )
    _budget_arguments(parser)
    add("--calib", action="append", metavar="SOURCE", help="wikitext2, c4, redpajama, a file, or self; may be repeated")
    add("--samples", type=int, metavar="N", help="calibration samples")
    add("--seqlen", type=int, metavar="L", help="tokens of each sample")
    add("--epochs", type=int, metavar="E", help="learning passes over the samples")
    add("--seed", type=int, metavar="S", help="of sampling and learning")
    add("--method", metavar="NAME", help="how a block is quantized")
    _head_argument(parser)
    add("--set", action="append", type=_key_value, default=[], metavar="K=V", help="any other setting; may be repeated")
    add("--config", type=Path, metavar="F.toml", help="settings, one `key = value` a line")
    add("--blocks", type=_block_range, metavar="A:B", help="quantize only these decoder blocks (half-open, from 0)")
    add("--offload", type=Path, metavar="DIR", help="keep hidden states in files there (a fast disk), not in memory")
    add("--overwrite", action="store_true", help="replace OUT once the new one is complete")
    add("--restart", action="store_true", help="drop an unfinished run instead of continuing it")
    add("--dry-run", action="store_true", help="say what will be needed; write nothing")
    _device_arguments(parser)


def _preprocess_arguments(parser: _Parser) -> None:
    add, defaults = parser.add_argument, PreprocessConfig()
    add("model", metavar="MODEL", help="hub name, HF folder or .gguf file")
    add("out", metavar="OUT", help="folder to be made; interrupted, the same command continues")
    add(
        "--text", action="append", required=True, metavar="SOURCE", help="what the adapters learn from; may be repeated"
    )
    add("--quantized", type=Path, metavar="DIR", help="MODEL packed by ptq161 (default: quantize it first)")
    add("--preset", default="paper", choices=PRESETS, help="of that first quantization (default paper)")
    add("--calib", action="append", metavar="SOURCE", help="of that first quantization (default: --text)")
    add("--steps", type=int, metavar="N", help=f"of training (default {defaults.steps}, the paper's)")
    add("--rank", type=int, metavar="R", help=f"of the adapters (default {defaults.rank})")
    add("--lr", type=float, metavar="X", help=f"learning rate at its start (default {defaults.lr:g})")
    add("--seqlen", type=int, metavar="L", help=f"tokens of each sample (default {defaults.seqlen})")
    add("--target", action="append", metavar="NAME", help="linears that get an adapter, e.g. q_proj; may be repeated")
    add("--seed", type=int, metavar="S", help="of sampling and learning")
    add("--set", action="append", type=_key_value, default=[], metavar="K=V", help="any other setting; may be repeated")
    add(
        "--ppl",
        action="append",
        default=[],
        metavar="SOURCE",
        help="held-out text: also quantize the result, and measure",
    )
    add("--ppl-seqlen", type=int, default=2048, metavar="L", help="tokens of a window of --ppl (default 2048)")
    add("--max-windows", type=int, metavar="N", help="only the first N windows of each held-out text")
    add("--maps", type=Path, metavar="F.png", help="draw where large weights lie before and after")
    add("--overwrite", action="store_true", help="replace OUT once the new one is complete")
    add("--restart", action="store_true", help="drop an unfinished run instead of continuing it")
    _device_arguments(parser)


def _eval_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="packed folder, HF folder, .gguf or hub name")
    add("--ppl", action="append", default=[], metavar="SOURCE", help="wikitext2, c4 or a file; may be repeated")
    add("--seqlen", type=int, default=2048, metavar="L", help="tokens of a window (default 2048)")
    add("--max-windows", type=int, metavar="N", help="only the first N windows of each text")
    add("--bos", action="store_true", help="put the BOS token before each window and each task's prompt")
    _task_arguments(parser)
    add("--seed", type=int, default=0, metavar="S", help="of drawing these examples (default 0)")
    _mode_argument(parser)
    add("--out", type=Path, metavar="results.jsonl", help="append the result as a row")
    _activations_argument(parser, "float32")
    _device_arguments(parser)


def _task_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("--tasks", type=_names, default=[], metavar="A,B", help="of lm-evaluation-harness: piqa,arc_easy,mmlu,...")
    add(
        "--task-data", type=Path, metavar="DIR", help="the tasks' JSON lines (docs/tasks.md), instead of the hub's data"
    )
    add("--limit", type=int, metavar="N", help="only the first N items of each task")
    add("--shots", type=int, metavar="N", help="examples in each prompt (default: as the task's definition has it)")


def _compare_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub name, HF folder or .gguf file")
    add("out", nargs="?", default=argparse.SUPPRESS, metavar="DIR", help="the same as --out DIR")
    add("--out", type=Path, metavar="DIR", help="folder of the comparison; interrupted, the same command continues")
    add(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B,...",
        help=f"presets ({', '.join(PRESETS)}) and baselines ({', '.join(BASELINES)}), each with settings of its own "
        "where wanted: paper:epochs=4 (default: all)",
    )
    add("--calib", action="append", required=True, metavar="SOURCE", help="as for quantize; the same for all methods")
    add("--ppl", action="append", required=True, metavar="SOURCE", help="wikitext2, c4 or a file; may be repeated")
    add("--samples", type=int, metavar="N", help="calibration samples (default 128; quick: 16)")
    add("--seqlen", type=int, metavar="L", help="tokens of each sample (default 2048; quick: 256)")
    add("--window", type=int, metavar="L", help="tokens of an evaluation window (default: as --seqlen; quick: 512)")
    add("--max-windows", type=int, metavar="N", help="only the first N windows of each text (default: all; quick: 16)")
    _task_arguments(parser)
    parser.set_defaults(bos=False)  # which only `eval` can put before prompts
    add("--seed", type=int, default=0, metavar="S", help="of sampling and learning")
    add("--preprocessed", metavar="DIR", help="a second model: every method gets another row on it")
    add("--quick", action="store_true", help="little text and few epochs: a first look, minutes for a small model")
    add("--restart", action="store_true", help="drop what DIR has instead of continuing it")
    add("--device", default="auto", help="cpu, cuda, ...; auto (default): the GPU if there is one")
    add(
        "--dtype", default="auto", choices=DTYPES, help="of every evaluation; auto (default): bfloat16 where it is fast"
    )


def _writing_arguments(parser: _Parser, max_new_tokens: int) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"at most (default {max_new_tokens})")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    add(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens that make up this share"
    )
    add("--seed", type=int, default=0, metavar="S", help="of sampling")
    _model_arguments(parser)


def _serve_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="packed folder, HF folder, .gguf or hub name")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; there is no password)")
    add("--port", type=_port, default=8000, metavar="N", help="port to listen on (default 8000; 0: any that is free)")
    add("--name", metavar="NAME", help="what clients call the model (default: the last part of PATH)")
    _model_arguments(parser)


def _bench_arguments(parser: _Parser) -> None:
    add = parser.add_argument
    add("path", nargs="?", metavar="PATH", help="packed folder")
    add("--shape", type=_shape, metavar="RxC", help="one linear of R outputs and C inputs with random weights instead")
    add("--threads", type=int, metavar="N", help="of the products (default: as torch has it)")
    add("--tokens", type=int, action="append", metavar="T", help="with --shape: rows of activations (1 and 128)")
    add(
        "--format",
        choices=("mixed", "paper", "int8"),
        default="mixed",
        help="with --shape: column groups; int8: a head",
    )
    add("--hot", action="store_true", help="with --shape: one copy of each weight, which caches may hold")
    add("--rounds", type=int, metavar="N", help="turns of every contender (default 40 for a shape, 3 for a model)")
    add("--prompt-tokens", type=int, action="append", metavar="T", help="with PATH: tokens to read first (default 128)")
    add("--new-tokens", type=int, default=32, metavar="T", help="with PATH: tokens to write")
    add("--dense", choices=("both", "float32", "bfloat16", "none"), default="both", help="with PATH: what against")


def _budget_arguments(parser: _Parser) -> None:
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--bits", type=float, metavar="B", help="honest bits per weight to stay within, e.g. 1.61")
    budget.add_argument("--salient-ratio", type=float, metavar="R", help="share of the channels at 4 bits, e.g. 0.2")


def _head_argument(parser: _Parser) -> None:
    text = "embedding and head: keep (default) at 16 bits, or int8 with a scale per vocabulary entry"
    parser.add_argument("--head", choices=[head.value for head in Head], help=text)


def _activations_argument(parser: _Parser, default: str) -> None:
    text = f"of packed linears on a CPU with native kernels (default {default})"
    parser.add_argument("--activations", choices=("int8", "float32"), default=default, help=text)


def _model_arguments(parser: _Parser) -> None:
    """How a model that writes is opened."""
    _mode_argument(parser)
    _activations_argument(parser, "int8")
    _device_arguments(parser)


def _device_arguments(parser: _Parser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto (default): the GPU if there is one")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of tensors that are not quantized")


def _mode_argument(parser: _Parser) -> None:
    modes = ("auto", "packed", "dense")
    parser.add_argument("--mode", choices=modes, default="auto", help="how the weights of a packed model are kept")


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE, e.g. epochs=4")
    return key.strip(), value.strip()


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names with commas between, e.g. piqa,arc_easy")
    return names


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxCOLS, e.g. 2048x8192")
    return int(rows), int(cols)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port number, 0 to 65535")
    return int(text)


def _block_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected A:B with A < B, e.g. 0:2 for the first two blocks")
    return int(first), int(last)
