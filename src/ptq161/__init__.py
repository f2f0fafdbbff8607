"""ptq161: large language models at 1.61 honest bits per weight, packed, loadable in transformers.

Importing the package imports neither torch nor transformers; public names are resolved on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "quantize": "ptq161.pipeline",
    "load": "ptq161.hf",
    "inspect": "ptq161.inspection",
    "perplexity": "ptq161.evaluate.perplexity",
    "QuantConfig": "ptq161.config",
    "CalibrationConfig": "ptq161.config",
    "PackedLinear": "ptq161.linear",
    "Ptq161Error": "ptq161.errors",
    "InputError": "ptq161.errors",
    "UnsupportedModel": "ptq161.errors",
    "UnsupportedModule": "ptq161.errors",
    "CheckpointError": "ptq161.errors",
    "NonFiniteError": "ptq161.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
