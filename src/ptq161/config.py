"""Every setting of the method and of its calibration data, as frozen dataclasses; presets; overrides.

Standard library only, so that `ptq161 --help` and `ptq161 inspect` stay instant.
"""

import dataclasses
import difflib
import enum
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ptq161.errors import InputError, one_line


class Statistic(enum.StrEnum):
    """What ranks the input channels (section 3.2, Table 5)."""

    ABSMAX = "absmax"  # published code: max |x| over every calibration token
    ABSMEAN = "absmean"  # the paper's wording: activation magnitude; robust against one outlier token
    HESSIAN = "hessian"  # OWQ's, which the paper compares with: the error of binarizing a channel, by its squared input


class SalientRange(enum.StrEnum):
    """What a row's 4-bit grid (Eq. 1) spans."""

    ROW = "row"  # published code: min and max of the whole row, binarized columns included
    SALIENT = "salient"  # min and max of the row's salient weights only


class Magnitude(enum.StrEnum):
    """The magnitude term of the block distance (Eq. 5)."""

    MSE = "mse"  # published code: mean squared error
    L2 = "l2"  # the paper's formula: the L2 norm, here per token and averaged
    RELATIVE = "relative"  # squared error over squared norm, per token: no token outweighs the others


class Allocation(enum.StrEnum):
    """What decides how many channels of each linear get 1 bit, a ternary digit or 4 bits (method `mixed`)."""

    FISHER = "fisher"  # expected change of the predictions: one backward pass of the whole model per sample
    UNIFORM = "uniform"  # the same shares everywhere: needs no pass, and no model in memory


class Distill(enum.StrEnum):
    """Whether the whole model is tuned against its original once all blocks are quantized."""

    OFF = "off"
    AUTO = "auto"  # if its predicted peak fits the memory at hand; otherwise run.json and one line say that it did not
    REQUIRED = "required"  # an error if it does not fit


class Head(enum.StrEnum):
    """How embedding and head are stored. They do not count in the bits per weight, and learning leaves them alone."""

    KEEP = "keep"  # as the other tensors that are not quantized
    INT8 = "int8"  # 8 bits a weight and a float16 scale per vocabulary entry; tied weights stay tied


class Compute(enum.StrEnum):
    """Arithmetic of the learning steps. Targets, streams and reported losses are always float32."""

    AUTO = "auto"  # bfloat16 where the hardware multiplies it natively, else float32
    BFLOAT16 = "bfloat16"  # matrix products under autocast; factors and loss stay float32
    FLOAT32 = "float32"


class Start(enum.StrEnum):
    """The weights that the restorative adapters are added to."""

    QUANTIZED = "quantized"  # the once-quantized model's, dequantized (section 3.4)
    ORIGINAL = "original"  # the model's own: the control, or what is trained through the grid


class Loss(enum.StrEnum):
    """What the restorative adapters learn from."""

    TEXT = "text"  # the next token of the text (section 3.4)
    LOGITS = "logits"  # the original model's next-token distributions on the text


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_seed(seed: int) -> None:
    _check(0 <= seed < 2**32, f"seed={seed} is out of range: expected 0 to {2**32 - 1}")


# Not typing.Self: beartype, which checks annotations in tests, takes it only inside classes that it decorates itself.
_AnySettings = TypeVar("_AnySettings", bound="_Settings")


class _Settings:
    """Shared by the two settings classes: typed overrides from text or TOML values."""

    def replaced(self: _AnySettings, values: Mapping[str, Any]) -> _AnySettings:
        """Return a copy with `values` (text or TOML scalars) converted to each field's type.

        Raises InputError for an unknown key (naming the nearest) or a value that does not fit the field.
        """
        return dataclasses.replace(self, **converted(type(self), values))  # type: ignore[type-var]


def converted(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Text or TOML scalars as values of the fields of a dataclass. Raises InputError (see `_Settings.replaced`)."""
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in fields:
            raise InputError(unknown("setting", key, fields))
    return {key: _convert(key, value, hints[key]) for key, value in values.items()}


@dataclasses.dataclass(frozen=True)
class QuantConfig(_Settings):
    """Every number of the methods. Defaults are the paper's (sections 3.2, 3.3, 4.1); presets change them.

    Where the paper's text and the published code differ, the default is what measured better (docs/algorithm.md).
    """

    method: str = "ptq161"
    bits: float | None = 1.61  # honest bits per weight to stay within; exclusive with salient_ratio
    salient_ratio: float | None = None  # share of the input channels kept at 4 bits
    # Method `ptq161`, the paper's: what is salient, and how it is binarized.
    statistic: Statistic = Statistic.ABSMEAN
    salient_range: SalientRange = SalientRange.SALIENT
    row_mean: bool = True  # centre each row before taking signs (published code; not in Eq. 9)
    lr_angular: float = 1e-3  # for the angular factors (alpha_r1, alpha_r2)
    # Method `mixed`: 1-bit, ternary and 4-bit channels, codes and scales learned together.
    allocation: Allocation = Allocation.FISHER
    allocation_samples: int = 8  # calibration samples of the backward passes
    lr_latent: float = 2e-2  # for the latent weights, in units of their matrix's mean magnitude
    # Learning of one block, both methods.
    magnitude: Magnitude = Magnitude.MSE
    angular: bool = True  # the negative-log-cosine term of Eq. 5 (ablated in Table 7)
    epochs: int = 20  # 0: keep the initial factors
    batch_size: int = 1
    lr_scale: float = 5e-4  # for the row scale (alpha_s); `mixed`: in units of the scale itself
    # Tuning of the whole model after the blocks (method `mixed`).
    distill: Distill = Distill.OFF
    distill_tokens: int = 1_000_000  # to learn from, repeats included
    distill_passes: int = 8  # at most, over a text that has fewer tokens
    distill_redraw: float = 0.3  # share of the tokens that a repeated pass takes from the original's predictions
    distill_fresh: bool = True  # text of the calibration sources that is no calibration sample; False: the samples
    distill_written: bool = True  # the original lengthens a text that is too short for so many passes
    distill_batch_size: int = 2  # samples of one step
    distill_lr_latent: float = 1e-3  # in units of the matrix's mean magnitude
    distill_lr_scale: float = 5e-4  # for scales, in units of themselves, and for norm weights
    head: Head = Head.KEEP
    compute: Compute = Compute.AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            (self.bits is None) != (self.salient_ratio is None),
            f"bits={self.bits} with salient_ratio={self.salient_ratio}: set exactly one of the two",
        )
        _check(
            self.bits is None or (math.isfinite(self.bits) and 1 < self.bits <= 8),
            f"bits={self.bits} is out of range: expected more than 1 and at most 8, e.g. 1.61",
        )
        _check(
            self.salient_ratio is None or 0 <= self.salient_ratio <= 1,
            f"salient_ratio={self.salient_ratio} is out of range: expected 0 to 1, e.g. 0.2",
        )
        _check(self.epochs >= 0, f"epochs={self.epochs} is out of range: expected 0 or more")
        for name in ("batch_size", "allocation_samples", "distill_tokens", "distill_passes", "distill_batch_size"):
            value = getattr(self, name)
            _check(value >= 1, f"{name}={value} is out of range: expected 1 or more")
        for name in ("lr_scale", "lr_angular", "lr_latent", "distill_lr_latent", "distill_lr_scale"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, f"{name}={value} is out of range: expected 0 or more")
        _check(0 <= self.distill_redraw <= 1, f"distill_redraw={self.distill_redraw} is out of range: expected 0 to 1")
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class CalibrationConfig(_Settings):
    """Which text the activations come from (section 4.1: 128 segments of 2048 tokens of WikiText2 train)."""

    sources: tuple[str, ...] = ("wikitext2",)
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        _check(len(self.sources) > 0, "no calibration source: name one with --calib FILE|wikitext2|c4|redpajama|self")
        _check(self.samples >= 1, f"samples={self.samples} is out of range: expected 1 or more")
        _check(self.seqlen >= 2, f"seqlen={self.seqlen} is out of range: expected 2 or more")
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class PreprocessConfig(_Settings):
    """Every number of the restorative LoRA (section 3.4). Defaults are the paper's, or its published code's."""

    steps: int = 20_000
    rank: int = 64
    alpha: int = 16  # an adapter's product is scaled by alpha / rank
    dropout: float = 0.1  # of what enters an adapter; not with through=true
    targets: tuple[str, ...] = ()  # last names of the linears that get one; none: all but the end of attention
    lr: float = 1e-4  # at the start of the cosine schedule, which ends at zero
    batch_size: int = 1  # samples of one pass
    accumulation: int = 2  # passes of one step
    seqlen: int = 1024  # tokens of a sample; not documented
    start: Start = Start.QUANTIZED
    loss: Loss = Loss.TEXT
    # Forward with the merged weights on the grid of the once-quantized model, backward straight through. Linears
    # without an adapter stay as they are.
    through: bool = False
    compute: Compute = Compute.AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "alpha", "batch_size", "accumulation"):
            value = getattr(self, name)
            _check(value >= 1, f"{name}={value} is out of range: expected 1 or more")
        _check(self.seqlen >= 2, f"seqlen={self.seqlen} is out of range: expected 2 or more")
        _check(math.isfinite(self.lr) and self.lr > 0, f"lr={self.lr} is out of range: expected more than 0")
        _check(0 <= self.dropout < 1, f"dropout={self.dropout} is out of range: expected 0 to less than 1")
        _check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named pair of settings and what it is for."""

    quant: QuantConfig
    calibration: CalibrationConfig
    purpose: str


_MIXED = QuantConfig(
    method="mixed", magnitude=Magnitude.RELATIVE, angular=False, epochs=4, lr_scale=5e-3, distill=Distill.OFF
)

PRESETS: dict[str, Preset] = {
    "best": Preset(
        dataclasses.replace(_MIXED, distill=Distill.AUTO),
        CalibrationConfig(samples=32, seqlen=512),
        "mixed widths, codes learned block by block, then the whole model against its original",
    ),
    "fast": Preset(_MIXED, CalibrationConfig(samples=32, seqlen=512), "the same without the last step: minutes"),
    "paper": Preset(
        QuantConfig(), CalibrationConfig(), "the paper's method and settings: 128 x 2048 tokens, 20 epochs"
    ),
}


DEFAULT_PRESET = "best"


def preset_named(name: str) -> Preset:
    """Look up a preset by name. Raises InputError naming the nearest one."""
    if name not in PRESETS:
        raise InputError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what was given, the nearest known one, and all of them."""
    known = list(known)
    name = one_line(name)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"unknown {kind} {name!r}{hint}; expected one of: {', '.join(known)}"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a flat TOML file of settings. Raises InputError if it cannot be read or has tables in it."""
    _check(not path.exists() or path.is_file(), f"cannot read settings file {path}: it is not a regular file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read settings file {path}: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"settings file {path} is not valid TOML: nested too deeply") from error
    except ValueError as error:  # bad UTF-8, bad TOML, or a number of thousands of digits
        raise InputError(f"settings file {path} is not valid TOML: {error}") from error
    tables = [key for key, value in values.items() if isinstance(value, dict)]
    _check(not tables, f"settings file {path} has a table [{', '.join(tables)}]: expected flat key = value lines")
    return values


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """Convert text or a TOML scalar to a field's type."""
    if isinstance(value, int):
        _check(abs(value) < 2**63, f"setting {key} is a number of more than 64 bits: expected a smaller one")
    if isinstance(wanted, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        wanted = next(t for t in typing.get_args(wanted) if t is not type(None))
    if typing.get_origin(wanted) is tuple:
        texts = tuple(value) if isinstance(value, list | tuple) else (value,)
        _check(all(isinstance(text, str) for text in texts), f"setting {key}={value!r}: expected text, or a list of it")
        return texts
    try:
        if isinstance(wanted, type) and issubclass(wanted, enum.StrEnum):
            return wanted(value)
        if wanted is bool:
            return _to_bool(value)
        if wanted is str and not isinstance(value, str):
            raise ValueError
        if isinstance(value, bool) or (wanted is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return wanted(value)
    except (OverflowError, TypeError, ValueError) as error:
        is_choice = isinstance(wanted, type) and issubclass(wanted, enum.Enum)
        expected = " or ".join(member.value for member in wanted) if is_choice else wanted.__name__
        raise InputError(f"setting {key}={value!r}: expected {expected}") from error


def _to_bool(value: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]
