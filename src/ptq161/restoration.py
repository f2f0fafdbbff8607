"""Training the restorative adapters: PEFT's LoRA under transformers' Trainer, in steps that can be taken up again.

Of several ranks each does its part of the passes of a step, under the Trainer's DistributedDataParallel.

The Trainer keeps its checkpoints in a folder of the caller's. One of them counts only once a marker stands in it that
is written last, so that whatever kills the process leaves the one before.
"""

import copy
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from jaxtyping import Float, Int64
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ptq161 import ranks
from ptq161.adapters import merged_weight, on_grid
from ptq161.arithmetic import products_dtype, products_in
from ptq161.binarize import QuantizedWeight
from ptq161.checkpoint import sync_folder, write_atomically
from ptq161.config import Loss, PreprocessConfig
from ptq161.distill import logits_divergence
from ptq161.errors import InputError, NonFiniteError

COMPLETE = "complete"  # the marker
TRAINER_STATE = "trainer_state.json"  # the Trainer's name for its own
ADAPTER = "default"  # PEFT's name for the only one

SECONDS_BETWEEN_SAVES = 300.0

OnStep = Callable[[int, int, float], None]  # step, steps, loss of the step


class Restoration:
    """The run of one model's adapters.

    model: what they are added to, float32, on its device; it is given its adapters here and `merge` takes them out
    again. targets: its linears that get one, by full name. teacher: the original, for Loss.LOGITS. grids: the
    once-quantized model's weights of the targets, for `config.through`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[str],
        config: PreprocessConfig,
        *,
        teacher: PreTrainedModel | None = None,
        grids: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        self.targets, self.config, self.teacher, self.grids = targets, config, teacher, grids or {}
        if model.device.type == "cpu":
            model.set_attn_implementation("eager")  # the backward pass of the fused kernel takes twice as long there
        # The same modules without adapters, sharing every parameter: called with other weights, or to be merged.
        self.plain: PreTrainedModel = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        torch.manual_seed(config.seed)  # PEFT draws the adapters from the global generator
        adapters = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
        )
        self.model: PeftModel = get_peft_model(model, adapters)
        self.model.peft_config[ADAPTER].base_model_name_or_path = None  # PEFT would ask the hub about it at every save

    def train(self, samples: Int64[Tensor, "samples seq"], folder: Path, on_step: OnStep) -> list[float]:
        """Do the steps that the newest checkpoint in `folder` leaves, and return the loss of every step.

        Raises NonFiniteError naming the step, Ptq161Error if another rank is gone.
        """
        last = ranks.from_first(lambda: newest_checkpoint(folder))
        if last is not None and _step_of(last) == self.config.steps:
            set_peft_model_state_dict(self.model, load_peft_weights(str(last), device=str(self.model.device)))
            return _losses(TrainerState.load_from_json(str(last / TRAINER_STATE)))
        device = self.model.device
        batch_size, accumulation = passes_of_a_rank(self.config)
        on_cpus = device.type == "cpu" and ranks.count() > 1
        if on_cpus:  # accelerate says cpu:0, and torch cannot load an optimizer's state to there
            PartialState(cpu=True).device = device
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.config.steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=self.config.lr,
            lr_scheduler_type="cosine",
            use_cpu=device.type == "cpu",
            accelerator_config={"use_configured_state": on_cpus},
            ddp_find_unused_parameters=False,
            seed=self.config.seed,
            save_strategy="no",  # when, says the watcher
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=device.type == "cuda",
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # else the Trainer multiplies the batch by the GPUs it sees
        trainer = _Trainer(
            self,
            model=self.model,
            args=arguments,
            train_dataset=[{"input_ids": sample} for sample in samples],
            callbacks=[_Watcher(on_step, SECONDS_BETWEEN_SAVES)],
        )
        trainer.remove_callback(PrinterCallback)
        with ranks.lost_ranks_reported():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        return _losses(trainer.state)

    def loss(self, tokens: Int64[Tensor, "batch seq"], adapted: torch.nn.Module | None = None) -> Float[Tensor, ""]:
        """What a step lowers, per predicted token and in nats; differentiable in the adapters.

        adapted: `self.model` as the Trainer has wrapped it, to share gradients among ranks.
        """
        device = tokens.device
        with products_in(products_dtype(self.config.compute, device), device):
            logits = self._logits(tokens, adapted or self.model)
            if self.config.loss is Loss.TEXT:
                return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            assert self.teacher is not None
            with torch.no_grad():
                wanted = self.teacher(input_ids=tokens, use_cache=False).logits
            return logits_divergence(logits, wanted)

    def _logits(self, tokens: Tensor, adapted: torch.nn.Module) -> Tensor:
        if not self.config.through:
            result: Tensor = adapted(input_ids=tokens, use_cache=False).logits
            return result
        with torch.autocast(tokens.device.type, enabled=False):
            weights = {f"{name}.weight": on_grid(weight, self.grids[name]) for name, weight in self.weights().items()}
        through: Tensor = torch.func.functional_call(
            self.plain, weights, (), {"input_ids": tokens, "use_cache": False}
        ).logits
        return through

    def weights(self) -> dict[str, Float[Tensor, "rows cols"]]:
        """Target -> its weight with the adapter merged, as it is now; differentiable in the adapters."""
        merged = {}
        for name in self.targets:
            layer: Any = self.model.get_submodule(f"base_model.model.{name}")
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            merged[name] = merged_weight(layer.base_layer.weight, down, up, layer.scaling[ADAPTER])
        return merged

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """The model with every adapter merged into its weight: plain modules again."""
        for name, weight in self.weights().items():
            linear: Any = self.plain.get_submodule(name)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.plain.eval()
        return self.plain


class _Trainer(Trainer):
    """Trainer with the losses of a Restoration."""

    def __init__(self, restoration: Restoration, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.restoration = restoration

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one pass; the Trainer averages over the passes of a step, and over ranks."""
        return self.restoration.loss(inputs["input_ids"], model)


@dataclass
class _Watcher(TrainerCallback):
    """Reports every step, stops at a loss that is not finite, and says when it is time for a checkpoint."""

    on_step: OnStep
    seconds_between_saves: float

    def __post_init__(self) -> None:
        self.saved_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint at the end, and where the last one is too long ago."""
        late = ranks.from_first(lambda: time.monotonic() - self.saved_at >= self.seconds_between_saves)
        control.should_save = late or state.global_step == state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report a step. Raises NonFiniteError."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise NonFiniteError(f"the adapters' loss is {logs['loss']} at step {state.global_step}; lower --lr")
        self.on_step(state.global_step, state.max_steps, logs["loss"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete once all ranks' parts of it are on the disk."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        ranks.gathered(state.global_step)
        if ranks.first():
            sync_folder(folder)
            write_atomically(folder / COMPLETE, lambda path: path.write_text(""))
        self.saved_at = time.monotonic()


def passes_of_a_rank(config: PreprocessConfig) -> tuple[int, int]:
    """Samples of a pass and passes of a step, of each rank; together they do `batch_size` x `accumulation` samples.

    Raises InputError if neither can be divided, or if the weights that the loss depends on are not the model's own.
    """
    number = ranks.count()
    if number > 1 and config.through:
        raise InputError(
            f"through=true with {number} ranks: the weights on the grid are not those whose gradients ranks share; "
            "leave it out, or start without torchrun"
        )
    if config.accumulation % number == 0:
        return config.batch_size, config.accumulation // number
    if config.batch_size % number == 0:
        return config.batch_size // number, config.accumulation
    raise InputError(
        f"batch_size={config.batch_size} and accumulation={config.accumulation}: one of them has to be a multiple of "
        f"the {number} ranks; give --set accumulation={-(-config.accumulation // number) * number}"
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, if there is one; incomplete ones are removed."""
    checkpoints = list(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        if not (checkpoint / COMPLETE).exists():
            shutil.rmtree(checkpoint)
    complete = [checkpoint for checkpoint in checkpoints if checkpoint.exists()]
    return max(complete, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _losses(state: TrainerState) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in state.log_history if "loss" in entry]
