"""Commands that make models: quantize, preprocess."""

import json
import shlex
from argparse import Namespace
from pathlib import Path

from ptq161.commands.common import require, show_result, torchrun_rank
from ptq161.commands.rows import weight_bytes
from ptq161.errors import InputError
from ptq161.options import preprocess_settings, quantize_settings


def quantize_command(args: Namespace) -> int:
    """A packed checkpoint, or with --dry-run what it will take."""
    keywords = quantize_settings(args) | {"blocks": args.blocks, "device": args.device, "dtype": args.dtype}
    keywords["offload"] = args.offload
    from ptq161 import meters, pipeline, ranks, tables, terminal

    with terminal.quiet_libraries(debug=args.debug), ranks.joined(args.device):
        if args.dry_run:
            plan = pipeline.plan(args.model, **keywords)
            return show_result(args, plan, lambda out: tables.show_plan(out, plan))
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
    source = weight_bytes(args.model)
    return show_result(args, result, lambda c: tables.show_quantized(c, result, source, [] if args.quiet else hints))


def preprocess_command(args: Namespace) -> int:
    """A dense model that quantizes better."""
    keywords = preprocess_settings(args)
    require("preprocess", "peft")
    if args.maps is not None:
        require("report", "matplotlib")
        if not args.maps.absolute().parent.is_dir():
            raise InputError(f"--maps {args.maps}: its folder does not exist; make it, or choose another file")
    from ptq161 import meters, ranks, tables, terminal
    from ptq161.before_after import SALIENT_MAPS
    from ptq161.preprocess import preprocess

    names = ("text", "quantized", "preset", "calib", "ppl", "ppl_seqlen", "max_windows")
    keywords |= {name: getattr(args, name) for name in (*names, "device", "dtype", "overwrite", "restart")}
    with terminal.quiet_libraries(debug=args.debug), ranks.joined(args.device):
        meter = meters.QuantizeMeter(quiet=args.quiet or not ranks.first())
        with meter:
            meter.line(f"reading {args.model} and the text")
            result = preprocess(args.model, args.out, on_progress=meter, **keywords)
    if args.maps is not None and not torchrun_rank():
        from ptq161.report.maps import maps_figure
        from ptq161.report.page import WIDE_INCHES

        maps_figure(json.loads(Path(args.out, SALIENT_MAPS).read_text()), WIDE_INCHES).savefig(args.maps, dpi=150)
    hint = None if args.quiet else f"ptq161 quantize {shlex.quote(args.out)} OUT"
    return show_result(args, result, lambda out: tables.show_preprocessed(out, result, hint))
