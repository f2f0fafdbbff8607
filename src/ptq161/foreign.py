"""Where files from strangers meet transformers: what a config.json may ask for, and one line for what goes wrong.

transformers trusts config.json: it builds as many layers as that says, and runs attention kernels from repositories
that it names. So it is checked before transformers sees it. Code beside the weights (`auto_map`) never runs: every
call of `from_pretrained` in this package says `trust_remote_code=False`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ptq161.errors import InputError, Ptq161Error, one_line

MAX_COUNT = 1024  # layers, heads, experts, labels: each costs time and memory before any weight is read
MAX_WIDTH = 2**20  # channels, vocabulary
MAX_NUMBER = 2**31
_COUNT = re.compile(r"num_.*|.*layers?")
_WIDTH = re.compile(r".*_(size|dim|embd|inner)")
_KERNEL = re.compile(r"_*(attn|experts)_implementation(_internal)?")


def config_problem(config: Mapping[Any, Any]) -> str | None:
    """Why transformers must not see this config.json, or None. `quantization_config` is ours, and checked elsewhere."""
    parts = [config]
    while parts:
        for name, value in parts.pop().items():
            key = str(name)  # once transformers has read it, id2label has numbers
            limit = MAX_COUNT if _COUNT.fullmatch(key) else MAX_WIDTH if _WIDTH.fullmatch(key) else MAX_NUMBER
            if isinstance(value, int) and abs(value) > limit:
                return f"has {key}={one_line(str(value))}, expected at most {limit}"
            if _KERNEL.fullmatch(key) and "/" in str(value):
                return f"has {key}={value!r}: code from elsewhere would run; take the field out"
            if key == "return_dict" and value is not True:
                return "has return_dict switched off: outputs are read by name; take the field out"
            if key != "quantization_config":
                inner = value if isinstance(value, list) else [value]
                parts += [part for part in inner if isinstance(part, Mapping)]
    return None


@contextmanager
def complaints(what: str, error_type: type[InputError] = InputError) -> Iterator[None]:
    """Turn whatever a library raises over a bad file into one line that begins with `what`; ours pass as they are."""
    try:
        yield
    except Ptq161Error:
        raise
    except Exception as error:  # no list of names would do: tokenizers raises bare Exception
        raise error_type(f"{what}: {one_line(str(error)) or type(error).__name__}") from error
