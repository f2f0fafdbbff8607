"""How anything is said to a person: consoles, quiet libraries, sizes and durations in words."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: paths and document ranges such as `[0:100]` are no markup."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        width=None if stream.isatty() else 100,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=True,
    )


@contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Keep the libraries' bars, logs and warnings off the terminal, unless debugging."""
    if debug:
        yield
        return
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def size(count: int) -> str:
    """Bytes for people: 78.1 MB, 1.83 GB (decimal units)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 3:25 min, 1:04 h."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    return f"{minutes}:{round(seconds) % 60:02} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02} h"


def optional(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash for one that does not apply."""
    return "-" if value is None else format(value, form)
