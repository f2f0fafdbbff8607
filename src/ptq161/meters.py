"""Progress on stderr, while a command runs. Numbers come in ready; nothing is decided here."""

from typing import TYPE_CHECKING

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from ptq161.machine import peak_rss_bytes
from ptq161.terminal import console, duration, size

if TYPE_CHECKING:
    from ptq161.walk import Progress


# Phases that go by steps of the whole model, and what their loss is.
LEARNED = {"distill": "divergence", "restore": "loss"}
# Those that learn nothing, in words.
UNLEARNED = {"measure": "measuring what widths are worth", "write": "writing text to learn from"}


class _Meter:
    """A bar on stderr where that is a terminal, plain lines where it is not, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = console(stderr=True)
        self.lines = not quiet and not self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        shown = not quiet and self.console.is_terminal
        self.bar = Bar(*columns, console=self.console, transient=True, disable=not shown)
        self.task: TaskID | None = None

    def __enter__(self) -> None:
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        """Print one line, if lines are wanted."""
        if self.lines:
            self.console.print(text)

    def show(self, description: str, share: float, figures: str) -> None:
        """Move the bar to a share of its length."""
        if self.task is None:
            self.task = self.bar.add_task(description, total=1.0, figures=figures)
        self.bar.update(self.task, description=description, completed=share, figures=figures)


class QuantizeMeter(_Meter):
    """Takes the pipeline's progress reports: block, phase, loss, time left, memory."""

    began_at: int | None = None
    first_report: tuple[int, float] | None = None  # step (late in a continued run) and seconds, in phases of LEARNED
    tenths = 0

    def __call__(self, progress: "Progress") -> None:
        """Show one report; without a terminal, a line for each finished block and each tenth of other learning."""
        if progress.phase in LEARNED:
            return self._learned(progress, LEARNED[progress.phase])
        if progress.phase in UNLEARNED:
            text = f"{UNLEARNED[progress.phase]} {progress.step}/{progress.steps}"
            return self.show(text, progress.step / progress.steps, duration(progress.seconds))
        if self.began_at is None:
            self.began_at = progress.block  # not `first` when an interrupted run is continued
        finished = progress.phase == "save"
        share = 1.0 if finished else progress.step / progress.steps if progress.phase == "learn" else 0.0
        done, total = progress.block - self.began_at + share, progress.last - self.began_at
        block = f"block {progress.block - progress.first + 1}/{progress.last - progress.first}"
        loss = "" if progress.loss is None else f"loss {progress.loss:.4g}  "
        left = f"{duration(progress.seconds / done * (total - done))} left  " if done else ""
        figures = f"{loss}{left}memory {size(peak_rss_bytes())}"
        self.show(f"{block} {progress.phase}", done / total, figures)
        if finished:
            self.line(f"{block}  {duration(progress.seconds)}  {figures}")

    def _learned(self, progress: "Progress", measure: str) -> None:
        done, total = progress.step, progress.steps
        if self.first_report is None:
            self.first_report = done, progress.seconds
        steps, seconds = done - self.first_report[0], progress.seconds - self.first_report[1]
        left = f"{duration(seconds / steps * (total - done))} left  " if steps else ""
        figures = f"{measure} {progress.loss:.4g}  {left}memory {size(peak_rss_bytes())}"
        self.show(f"{progress.phase} {done}/{total}", done / total, figures)
        if done * 10 // total != self.tenths:
            self.tenths = done * 10 // total
            self.line(f"{progress.phase} {done}/{total}  {duration(progress.seconds)}  {figures}")


class EvaluationMeter(_Meter):
    """Takes how much of one evaluation is done, in some unit; without a terminal, a line for about every tenth."""

    def __init__(self, name: str, unit: str, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self.name = name
        self.unit = unit
        self.tenths = 0

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` units are evaluated; after the last one, another count may begin."""
        self.show(self.name, done / total, f"{self.unit} {done}/{total}")
        if done == 1:
            self.tenths = 0
        if done * 10 // total > self.tenths:
            self.tenths = done * 10 // total
            self.line(f"{self.name}: {self.unit} {done}/{total}")


class CompareMeter(_Meter):
    """Takes what a comparison is doing; without a terminal, a line for about every tenth of it."""

    last: tuple[str, str, int] | None = None

    def __call__(self, row: str, what: str, done: int, total: int) -> None:
        """Show that of `row`, `done` of `total` steps of `what` are behind it."""
        self.show(f"{row}: {what} {done}/{total}", done / total, f"memory {size(peak_rss_bytes())}")
        if (reached := (row, what, done * 10 // total)) != self.last:
            self.last = reached
            self.line(f"{row}: {what} {done}/{total}")
