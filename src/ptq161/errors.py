"""The error family: one clear line each, raised at the edge, printed by the command line without a traceback."""

MAX_MESSAGE = 900  # characters


class Ptq161Error(Exception):
    """Base of every error this package raises on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(Ptq161Error, ValueError):
    """A bad argument, setting, file or folder. Raised before anything was changed (exit code 2)."""

    exit_code = 2


class UnsupportedModel(InputError):
    """The model's architecture cannot be quantized by this package; the message names the part."""


class UnsupportedModule(UnsupportedModel):
    """A decoder block keeps weights in something other than `nn.Linear`."""


class CheckpointError(InputError):
    """A packed checkpoint is truncated, tampered with, or of another format version; names file and tensor."""


class NonFiniteError(Ptq161Error, ArithmeticError):
    """NaN or infinity in weights, activations or a loss; names block, layer and epoch (exit code 1)."""


class FailedElsewhere(Ptq161Error):
    """Of several ranks, another one failed and says why; this one has nothing to add."""


def one_line(text: str) -> str:
    """Text that may quote a stranger's file, safe to print: one line, control characters escaped, not too long."""
    text = _cut(" ".join(text.split()))
    return _cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 200]} ... {text[-200:]}"
