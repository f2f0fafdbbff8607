"""What the page about one packed model is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Channels:
    """Input channels of one linear: how much each counts by the measure that decided, and the code width it got."""

    block: int
    linear: str
    measure: str  # such as "mean |x|"
    importance: Sequence[float]
    widths: Sequence[str]


@dataclass(frozen=True)
class Corner:
    """Stored levels of some rows and neighbouring channels of one linear: codes by row, and the channels' widths."""

    linear: str
    first_channel: int
    codes: Sequence[Sequence[int]]
    widths: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """One row of the perplexity table; `result` is the JSON of `ptq161 eval`."""

    name: str
    file_bytes: int
    result: Mapping[str, Any]

    @property
    def perplexities(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(source, perplexity entry) pairs."""
        return list(self.result["perplexity"].items())


@dataclass(frozen=True)
class Sample:
    """What both models wrote after the same prompt, unedited."""

    prompt: str
    original: str
    packed: str


@dataclass(frozen=True)
class ModelResults:
    """Everything on the page. `quantize` and `inspect` are the JSON of those commands, `run` is the packed run.json."""

    name: str
    source_label: str  # what the source file is, e.g. "source file (GGUF, Q4_1)"
    source_bytes: int
    quantize: Mapping[str, Any]
    run: Mapping[str, Any]
    inspect: Mapping[str, Any]
    evaluations: Sequence[Evaluation]  # the original first, the packed model last
    channels: Sequence[Channels]
    corner: Corner
    samples: Sequence[Sample]
    commands: Sequence[str]
    caveats: Sequence[str]

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that the model was quantized with."""
        config: Mapping[str, Any] = self.run["config"]
        return config

    @property
    def method(self) -> str:
        """How it was quantized: a key of EXPLANATIONS."""
        method: str = self.config["method"]
        return method

    @property
    def width_shares(self) -> dict[str, float]:
        """Code width -> its share of the quantized weights, for the widths that occur."""
        weights: dict[str, int] = {}
        for kind in self.inspect["layers"]:
            for width, columns in kind["columns"].items():
                weights[width] = weights.get(width, 0) + kind["linears"] * kind["rows"] * columns
        return {width: count / sum(weights.values()) for width, count in weights.items()}
