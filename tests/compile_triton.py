"""Compile the GPU programs for compute capability 9.0, where no GPU is needed, and print what they use as JSON.

python tests/compile_triton.py bf16|fp16|fp32 TOKENS ROWS      (rows of a program: 16 or 32)
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptq161.kernels import triton as programs

MIXED = ((1, -1, 2, False, False), (2, -1, 1, False, False), (4, -15, 2, False, False))
PAPER = ((1, -1, 2, False, True), (4, -15, 2, True, False))
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = {"x_ptr", "tiles_ptr", "order_ptr", "col_ptr", "bias_ptr", "y_ptr", "dense_ptr", "tile_bytes"}


def usage(function, pointers: dict, constants: dict, warps: int = 4, stages: int = 2) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and bytes of shared memory of a program."""
    names = function.arg_names
    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    constants = constants | {name: None for name, kind in pointers.items() if kind == "constexpr"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in ALIGNED and kinds[name] != "constexpr"
    }
    source = ASTSource(function, kinds, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(BINARIES / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK")}
    return {"registers": found["REG"], "stack": found["STACK"], "shared": compiled.metadata.shared}


def main() -> None:
    """Both formats' products, and one dequantization."""
    dtype, tokens, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    split = dtype == "fp32"
    result = {}
    for name, groups, vectors in (("mixed", MIXED, "constexpr"), ("paper", PAPER, "*fp16")):
        pointers = {"x_ptr": f"*{dtype}", "tiles_ptr": "*u8", "order_ptr": "*i32", "y_ptr": f"*{dtype}"}
        pointers |= {"col_ptr": vectors, "bias_ptr": "constexpr" if vectors == "constexpr" else f"*{dtype}"}
        dot = tl.float16 if dtype == "fp16" else tl.bfloat16
        constants = {"GROUPS": groups, "SPLIT": split, "DOT": dot, "T": tokens, "R": rows, "S": 4, "KW": 16}
        constants |= {"INTERPRETED": False}
        result[name] = usage(programs.multiply, pointers, constants, stages=1 if split else 2)
    pointers = {"tiles_ptr": "*u8", "order_ptr": "*i32", "col_ptr": "*fp16", "dense_ptr": f"*{dtype}"}
    result["dequantize"] = usage(programs.dequantize, pointers, {"GROUP": PAPER[1], "COLUMNS": 128})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
