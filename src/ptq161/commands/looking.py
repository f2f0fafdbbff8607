"""Commands that look at a model or at this machine: inspect, verify, bench."""

from argparse import Namespace

from ptq161.commands.common import fail, show_result
from ptq161.config import Head, QuantConfig
from ptq161.errors import InputError


def inspect_command(args: Namespace) -> int:
    """Bits and bytes by part."""
    budget = {"bits": args.bits, "salient_ratio": args.salient_ratio}
    if budget != dict.fromkeys(budget):
        QuantConfig().replaced(budget)  # refuses what is out of range before anything heavy is loaded
    from ptq161 import inspection, tables, terminal

    with terminal.quiet_libraries(debug=args.debug):
        result = inspection.inspect(args.path, **budget, head=args.head or Head.KEEP)
    return show_result(args, result, lambda out: tables.show_inspected(out, args.path, result))


def verify_command(args: Namespace) -> int:
    """Whether a packed checkpoint is sound."""
    from ptq161 import tables, terminal
    from ptq161.verify import verify

    result = verify(args.path)
    if result["ok"]:
        return show_result(
            args, result, lambda out: out.print(f"{args.path}: every file and tensor is as it was saved")
        )
    if args.json:  # a list of problems is what was asked for, unlike the outcome of a command that failed
        show_result(args, result, lambda out: None)
    tables.show_problems(terminal.console(stderr=True), result["problems"])
    return fail(f"{args.path} is not a sound packed checkpoint; problems listed above: {len(result['problems'])}", 2)


def bench_command(args: Namespace) -> int:
    """Speed of one shape or of a packed model."""
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
            return show_result(args, result, lambda out: tables.show_shape_speed(out, result))
        dense = {"both": ["float32", "bfloat16"], "none": []}.get(args.dense, [args.dense])
        result = model_speed.bench_model(
            args.path,
            prompt_tokens=args.prompt_tokens or [128],
            new_tokens=args.new_tokens,
            rounds=args.rounds or 3,
            dense=dense,
        )
    return show_result(args, result, lambda out: tables.show_model_speed(out, result))
