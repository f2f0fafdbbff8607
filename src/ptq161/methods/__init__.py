"""The methods by name: read top to bottom. Each turns one decoder block into quantized weights."""

from ptq161.methods.ptq161 import Method, ptq161

METHODS: dict[str, Method] = {
    "ptq161": ptq161,
}
