"""What preprocessing changed: perplexities of the model before and after, and where its salient weights lie."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161 import ranks
from ptq161.adapters import concentration, salient_counts
from ptq161.checkpoint import write_atomically
from ptq161.evaluate.perplexity import perplexity

SALIENT_MAPS = "salient_maps.json"  # in the preprocessed model's folder: what `report.maps` draws
MAP_BINS = 64  # cells of a salient map along each axis


class Perplexities:
    """Perplexities by stage, in float32, kept in a file, so that a continued run measures none twice."""

    def __init__(
        self,
        path: Path,
        held_out: Mapping[str, Int64[Tensor, " tokens"]],
        seqlen: int,
        max_windows: int | None,
        device: torch.device,
    ) -> None:
        self.path, self.held_out, self.device = path, held_out, device
        self.seqlen, self.max_windows = seqlen, max_windows
        self.stages: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, stage: str, model: Callable[[], PreTrainedModel]) -> None:
        """Measure a model on every held-out text, unless that has been done; the model becomes float32."""
        if not self.held_out or stage in self.stages:
            return
        measured = model().float().to(self.device)
        self.stages[stage] = {
            name: perplexity(measured, tokens, self.seqlen, max_windows=self.max_windows)
            for name, tokens in self.held_out.items()
        }
        text = json.dumps(self.stages)
        ranks.from_first(lambda: write_atomically(self.path, lambda path: path.write_text(text)))

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Source -> stage -> what `perplexity` returns."""
        return {name: {stage: found[name] for stage, found in self.stages.items()} for name in self.held_out}


def salient_weights(
    stages: Mapping[str, Mapping[str, Tensor]], linears: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Mean `concentration` of some linears by stage; and maps of the first, the middle and the last (Fig. 4 and 10).

    stages: name -> tensors by their names in the model.
    """
    shown = dict.fromkeys((linears[0], linears[len(linears) // 2], linears[-1]))
    spread: dict[str, float] = {}
    maps: list[dict[str, Any]] = []
    for stage, weights in stages.items():
        spread[stage] = sum(concentration(weights[f"{name}.weight"].float()) for name in linears) / len(linears)
        for name in shown:
            weight = weights[f"{name}.weight"].float()
            counts = salient_counts(weight, MAP_BINS).tolist()
            maps.append({"linear": name, "stage": stage, "shape": list(weight.shape), "counts": counts})
    return spread, maps
