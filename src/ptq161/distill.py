"""End-to-end tuning after the blocks: the quantized model's predictions towards those of the original.

The loss is the Kullback-Leibler divergence from the original's next-token distribution, per token. Learned are the
latents and scales of every linear, as in the blocks, and the weights of the norms. The model in memory stays the
original: the quantized one is the same modules called with other weights (`student`), so no second copy of it exists.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ptq161 import ranks
from ptq161.arithmetic import products_in
from ptq161.causal import fast_attention
from ptq161.config import QuantConfig
from ptq161.errors import NonFiniteError
from ptq161.fit import latent_parameters
from ptq161.passes import Passes
from ptq161.student import Student

WARM_UP = 8  # steps over which the learning rates rise: the first gradients have no history to be scaled by
LAST_RATE = 0.03  # share of the learning rates at which the cosine schedule ends
MOMENTS = (0.9, 0.95)  # of AdamW: gradients of one or two samples change too fast for the usual 0.999
ROWS_AT_ONCE = 32  # of the loss: their distributions over the vocabulary stay in the processor's cache

CURVE_POINTS = 100  # at most, of the record of a run

SECONDS_BETWEEN_SAVES = 300.0

OnStep = Callable[[int, int, float], None]  # step, steps, divergence of the step


class Distillation:
    """A run of AdamW over shuffled samples that can be taken up again from its `state`.

    samples: (samples, seq) token ids on the model's device, read in passes (`passes`).
    """

    def __init__(
        self, model: PreTrainedModel, student: Student, samples: Int64[Tensor, "samples seq"], config: QuantConfig
    ) -> None:
        self.model, self.student, self.config = model, student, config
        self.steps = step_count(len(samples), samples.shape[1], config)
        self.passes = Passes(samples, config.distill_batch_size, config.distill_redraw, config.seed)
        self.step, self.losses = 0, list[float]()
        rates = (config.distill_lr_latent, config.distill_lr_scale)
        groups = [
            *latent_parameters(student.latents, *rates),
            {"params": list(student.norms.values()), "lr": config.distill_lr_scale},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=MOMENTS, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(self, on_step: OnStep, save: Callable[[], None]) -> None:
        """Do the steps that are left, calling `save` after each (which decides whether it is time).

        Raises NonFiniteError naming the step.
        """
        while self.step < self.steps:
            loss = self._learn()
            self.losses.append(loss)
            self.step += 1
            on_step(self.step, self.steps, loss)
            save()

    def _learn(self) -> float:
        share = max(LAST_RATE, 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share * min(1.0, (self.step + 1) / WARM_UP)
        self.optimizer.zero_grad()
        tokens = self.passes.batch(self.step)
        loss, own, wanted = 0.0, ranks.share(tokens), None
        if len(own):
            wanted = predictions(self.model, own, self.student.dtype)
            part = divergence(self.model, self.student, own, wanted) * (len(own) / len(tokens))
            part.backward()
            loss = part.item()
        (loss,) = ranks.total(loss)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"distillation diverged at step {self.step} of {self.steps}; lower distill_lr_latent and "
                "distill_lr_scale (--set), or give --set distill=off"
            )
        ranks.add_gradients(self.student.leaves().values())
        self.optimizer.step()
        if self.passes.read_again(self.step, self.steps):
            self.passes.redraw(self.step, wanted)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Everything that a continued run needs, by name."""
        state = {f"value {name}": leaf.detach() for name, leaf in self.student.leaves().items()}
        for name, leaf in self.student.leaves().items():
            state |= {f"{key} {name}": value for key, value in self.optimizer.state[leaf].items()}
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return state | {"step": torch.tensor(self.step), "losses": losses, "text": self.passes.text}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state` was taken."""
        self.step, self.losses = int(state["step"]), state["losses"].tolist()
        self.passes.text.copy_(state["text"])
        for name, leaf in self.student.leaves().items():
            leaf.copy_(state[f"value {name}"])
            kept = {key: state[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[leaf] = {key: value.to(leaf.device, copy=True) for key, value in kept.items()}


def step_count(samples: int, seqlen: int, config: QuantConfig) -> int:
    """Steps within `distill_tokens` and `distill_passes`: none if not even one has the samples and tokens it needs."""
    size = config.distill_batch_size
    return min(config.distill_tokens // (size * seqlen), config.distill_passes * (samples // size))


@torch.no_grad()
def predictions(
    model: PreTrainedModel, tokens: Int64[Tensor, "batch seq"], dtype: torch.dtype
) -> Float[Tensor, "batch seq vocab"]:
    """The original's logits; matrix products run in `dtype` (`arithmetic`)."""
    with products_in(dtype, tokens.device):
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def divergence(
    model: PreTrainedModel,
    student: Student,
    tokens: Int64[Tensor, "batch seq"],
    wanted: Float[Tensor, "batch seq vocab"],
) -> Float[Tensor, ""]:
    """Mean KL(original || student) over the positions of a batch, in nats; differentiable in the student.

    wanted: what the original predicts for the tokens. Distributions are float32.
    """
    return logits_divergence(student.logits(model, tokens), wanted)


def logits_divergence(
    actual: Float[Tensor, "batch seq vocab"], wanted: Float[Tensor, "batch seq vocab"]
) -> Float[Tensor, ""]:
    """Mean KL(wanted || actual) over the positions, in nats, of the distributions that logits stand for."""
    result: Tensor = _Divergence.apply(actual.flatten(0, 1), wanted.flatten(0, 1))  # type: ignore[no-untyped-call]
    return result


def tune(
    model: PreTrainedModel,
    student: Student,
    held_out: Int64[Tensor, "few seq"],
    learned: Int64[Tensor, "learned seq"],
    config: QuantConfig,
    state: Mapping[str, Tensor] | None,
    on_step: OnStep,
    save: Callable[[Mapping[str, Tensor]], None],
) -> dict[str, Any]:
    """Tune a student on learned samples and judge by those held out; continue from `state` where there is one.

    `save` is handed a state now and then, at the latest when all steps are done; a continued run gives the same result.
    Returns the JSON record: tokens, steps, the divergence on the held-out samples before and after, its `curve` on what
    was read, and whether the student is `kept`: it is not if it ended no better than it began.

    Raises NonFiniteError naming the step.
    """
    first = held_out_divergence(model, student, held_out) if state is None else float(state["held_out_first"])
    run = Distillation(model, student, learned, config)
    if state is not None:
        run.restore(state)
    saved = time.monotonic()

    def save_sometimes() -> None:
        nonlocal saved
        if run.step == run.steps or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            save(run.state() | {"held_out_first": torch.tensor(first, dtype=torch.float64)})
            saved = time.monotonic()

    with fast_attention(model, learned.device):
        run.run(on_step, save_sometimes)
    last = held_out_divergence(model, student, held_out)
    tokens = config.distill_batch_size * learned.shape[1]  # of a step
    return {
        "steps": run.steps,
        "tokens": run.steps * tokens,
        "distinct_tokens": learned.numel(),
        "held_out_first": first,
        "held_out_last": last,
        "curve": curve(run.losses, tokens),
        "kept": last < first,
    }


def curve(losses: Sequence[float], tokens: int) -> list[dict[str, float]]:
    """Mean divergence over equal stretches of steps (the last may be shorter), each with the tokens read by its end.

    tokens: of a step. Where every token is read once, the divergence is that on text not yet learned from.
    """
    stretch = -(-len(losses) // CURVE_POINTS)
    ends = [min(first + stretch, len(losses)) for first in range(0, len(losses), max(stretch, 1))]
    means = [statistics.fmean(losses[first:end]) for first, end in zip([0, *ends], ends, strict=False)]
    return [{"tokens": end * tokens, "divergence": mean} for end, mean in zip(ends, means, strict=True)]


def written_count(samples: int, seqlen: int, config: QuantConfig) -> int:
    """Samples to be written besides the given ones, so that all passes make up `distill_tokens`; none from nothing."""
    if not config.distill_written or not samples:
        return 0
    return max(config.distill_tokens // (config.distill_passes * seqlen) - samples, 0)


def held_out_count(samples: int) -> int:
    """How many of the samples are held out: a tenth, at least one (where there is one) and at most eight."""
    return min(max(samples // 10, 1), 8, samples)


@torch.no_grad()
def held_out_divergence(model: PreTrainedModel, student: Student, samples: Int64[Tensor, "samples seq"]) -> float:
    """`divergence` averaged over samples that are not learned from, of which every rank does its share."""
    total = 0.0
    for tokens in ranks.share(samples)[:, None]:
        total += divergence(model, student, tokens, predictions(model, tokens, student.dtype)).item()
    (total,) = ranks.total(total)
    return total / len(samples)


class _Divergence(torch.autograd.Function):
    """KL divergence per row from logits. The gradient, softmax(actual) - softmax(wanted), is made in the same pass."""

    @staticmethod
    def forward(ctx: Any, actual: Float[Tensor, "rows vocab"], wanted: Float[Tensor, "rows vocab"]) -> Tensor:
        total = torch.zeros((), device=actual.device)
        gradient = torch.empty_like(actual)
        for start in range(0, len(actual), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_actual = actual[rows].float().log_softmax(-1)
            log_wanted = wanted[rows].float().log_softmax(-1)
            chance = log_wanted.exp()
            total += torch.linalg.vecdot(chance.flatten(), log_wanted.sub_(log_actual).flatten())
            gradient[rows] = log_actual.exp_().sub_(chance)
        ctx.save_for_backward(gradient)
        return total / len(actual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad / len(gradient)), None
