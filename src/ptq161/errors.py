"""The error family: one clear line each, raised at the edge, printed by the command line without a traceback."""


class Ptq161Error(Exception):
    """Base of every error this package raises on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


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
