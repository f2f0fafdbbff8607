"""The methods by name: read top to bottom. Each turns one decoder block into quantized weights."""

from ptq161.methods.mixed import mixed
from ptq161.methods.ptq161 import ptq161
from ptq161.methods.result import BlockResult, Method

__all__ = ["METHODS", "BlockResult", "Method"]

METHODS: dict[str, Method] = {
    "ptq161": ptq161,
    "mixed": mixed,
}
