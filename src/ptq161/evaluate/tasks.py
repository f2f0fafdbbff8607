"""Tasks through EleutherAI's lm-evaluation-harness: its prompts, its metrics, its standard errors.

Only where the data come from can be changed. Needs the extra `tasks`.
"""

import copy
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as definitions
from lm_eval.tasks._factory import TaskFactory
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.errors import InputError, NonFiniteError
from ptq161.evaluate.taskdata import TASKS, LocalTask, local_task, read_rows
from ptq161.foreign import complaints
from ptq161.hub import hub_reachable

BOOTSTRAPS = 1000  # resamples, for the standard errors that have no formula (perplexity)
OnRequest = Callable[[int, int], None]  # requests answered, requests in all


@dataclass(frozen=True)
class TaskSettings:
    """limit: only the first so many items of each task (of each subject, for MMLU). shots: examples in the prompt; None
    for as many as the task's definition says. seed: of drawing them, and of what is written. bos: put BOS before every
    prompt; where the tokenizer does so by itself, it stands there anyway.
    """

    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    bos: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit={self.limit} is out of range: expected 1 or more items of each task")
        if self.shots is not None and self.shots < 0:
            raise InputError(f"shots={self.shots} is out of range: expected 0 or more examples")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups of tasks with their data, and the folder these came from (None: the hub)."""

    members: tuple[Task | Group, ...]
    data: Path | None


@dataclass(frozen=True)
class TaskResult:
    """One task's figures under the harness' names: `acc`, or with the filter that found the answer
    `exact_match,strict-match`.

    errors: their standard errors, None where there is none. items: how many questions. settings: `shots` and `bos` as
    they came to be. version: of the task's definition.
    """

    task: str
    metrics: dict[str, float]
    errors: dict[str, float | None]
    items: int
    settings: TaskSettings
    version: str
    data: Path | None

    def row(self) -> dict[str, Any]:
        """As JSON: the metrics, `n`, and what they depend on."""
        figures: dict[str, Any] = {}
        for name, value in self.metrics.items():
            figures |= {name: value, f"{name}_stderr": self.errors[name]}
        where = {"data": None if self.data is None else str(self.data)}
        harness = {"version": self.version, "lm_eval": version("lm_eval")}
        return figures | {"n": self.items} | asdict(self.settings) | where | harness


def load_tasks(names: Sequence[str], data: Path | None, settings: TaskSettings) -> LoadedTasks:
    """Read the tasks' definitions and data: from the hub, or from JSON lines in the folder `data` (docs/tasks.md).

    Raises InputError: an unknown name, no hub, a missing or malformed file, or shots asked for where there are none.
    """
    folders: list[Path] | None = None
    if data is not None:
        folders = sorted({Path(definitions).parent / _local(name, settings).folder for name in names})
    elif not hub_reachable():
        raise InputError(
            "tasks come from the Hugging Face hub, which cannot be reached from here: give --task-data DIR"
        )
    manager = TaskManager(include_defaults=folders is None, include_path=folders)
    members: list[Task | Group] = []
    with _silence():
        for name in dict.fromkeys(names):
            entry = manager.task_index.get(name)
            if entry is None:
                near = ", ".join(get_close_matches(name, manager.all_tasks))
                raise InputError(f"unknown task {name!r}; near it are: {near or 'none'} (`lm_eval ls tasks` lists all)")
            overrides = None if data is None else _overrides(_local(name, settings), data)
            with complaints(f"cannot load the task {name}"):
                built = TaskFactory().build(entry, overrides=overrides, registry=manager.task_index)
            members += built if isinstance(built, list) else [built]
    return LoadedTasks(tuple(members), data)


def _local(name: str, settings: TaskSettings) -> LocalTask:
    task = local_task(name)
    if task is None:
        known = ", ".join([*TASKS, "mmlu_SUBJECT", "longbench_SET"])
        raise InputError(f"no local data are known for the task {name!r}: with --task-data expected some of {known}")
    if settings.shots and "dev" not in task.files:
        raise InputError(
            f"shots={settings.shots}: local data of {name} have no examples to show; use 0, or the hub's data"
        )
    return task


def _overrides(task: LocalTask, folder: Path) -> dict[str, Any]:
    """What replaces parts of a task's definition: the splits that there are, and where their rows come from."""
    splits = read_rows(folder, task)

    def local_dataset(*, config_source: str, **_: Any) -> dict[str, Dataset]:
        # The harness says only by its file which task it is that wants data.
        subject = Path(config_source).stem.removeprefix("mmlu_")
        chosen = {
            split: [row for row in rows if row.get("subject", subject) == subject] for split, rows in splits.items()
        }
        for split, rows in chosen.items():
            if not rows:
                raise InputError(f"{folder / task.files[split]} has no rows with the subject {subject!r}")
        return {split: Dataset.from_list(rows) for split, rows in chosen.items()}

    found = {f"{split}_split": split if split in splits else None for split in ("training", "validation", "test")}
    few = {"fewshot_split": "dev"} if "dev" in splits else {"fewshot_split": None, "num_fewshot": 0}
    return {"custom_dataset": local_dataset, **found, **few}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    settings: TaskSettings,
    on_request: OnRequest | None = None,
) -> tuple[TaskResult, ...]:
    """Measure a model, packed or not, as it is.

    on_request: called with (requests answered, requests in all) after each; an option of a question is one request.
    Meanwhile nothing that is printed is seen.
    Raises InputError if BOS is asked for and the tokenizer has none; NonFiniteError for logits that are not finite.
    """
    tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    if settings.bos:
        tokenizer.add_bos_token = True
    starts_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if settings.bos and not starts_with_bos:
        raise InputError("this tokenizer cannot put a BOS token before a prompt; leave --bos out")
    chosen = TaskManager(include_defaults=False).load(list(tasks.members))
    for task in chosen["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (default and settings.shots is not None):  # 0 in a definition is there for a reason
            task.set_config("num_fewshot", settings.shots or 0)
        task.set_fewshot_seed(settings.seed)
    with _silence(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        watched = _Watched(model, tokenizer, on_request)
        measured = evaluate(watched, chosen, limit=settings.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    settings = replace(settings, bos=starts_with_bos)
    return tuple(_result(member, measured, settings, tasks.data) for member in tasks.members)


def _result(member: Task | Group, measured: Mapping[str, Any], settings: TaskSettings, data: Path | None) -> TaskResult:
    name = member.name if isinstance(member, Group) else member.task_name
    leaves = [task.task_name for task in member.get_all_tasks()] if isinstance(member, Group) else [name]
    found = measured["results"][name]
    metrics, errors = {}, {}
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = found[f"{metric}_stderr,{filtered}"]
            called = metric if filtered == "none" else key
            metrics[called] = float(value)
            errors[called] = None if error == "N/A" else float(error)
    return TaskResult(
        name,
        metrics,
        errors,
        items=sum(measured["n-samples"][leaf]["effective"] for leaf in leaves),
        settings=replace(settings, shots=max(measured["n-shot"][leaf] for leaf in leaves)),
        version=str(measured["versions"][name]),
        data=data,
    )


class _Watched(HFLM):  # type: ignore[misc]  # no types are shipped with it
    """The harness' view of a model: one request at a time, each reported, its logits refused if they are not finite."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_request: OnRequest | None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.on_request, self.done, self.total = on_request, 0, 0
        self.cache_hook = self  # the harness tells it every answer, through `add_partial`

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self.done += 1
        if self.on_request is not None:
            self.on_request(self.done, self.total)

    def _model_call(self, *args: Any, **keywords: Any) -> Tensor:
        logits: Tensor = super()._model_call(*args, **keywords)
        if not logits.isfinite().all():
            raise NonFiniteError("the model's logits overflow: no task can be measured")
        return logits

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.done, self.total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.done, self.total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self.done, self.total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm)


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the harness' bars, prints and notes off the terminal."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()
