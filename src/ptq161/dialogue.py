"""Text that goes back and forth between a person, or a pipe, and a model that writes."""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ptq161.errors import InputError
from ptq161.terminal import duration


def writer(*, silent: bool) -> Callable[[str], None]:
    """Writes pieces of text to stdout as they come, or nowhere."""

    def write(text: str) -> None:
        if not silent:
            print(text, end="", flush=True)

    return write


def reader(prompt: str, *, hint: str | None, silent: bool) -> Callable[[], str]:
    """Reads a line of standard input at each call. A person there sees first the hint, and a prompt each time.

    silent: nothing is written to stdout. The function raises EOFError at the end, InputError for what is no text.
    """
    person = sys.stdin.isatty()
    editing = person and sys.stdout.isatty() and not silent
    if person and hint is not None:
        print(hint, file=sys.stderr)
    if editing:
        with suppress(ImportError):  # not everywhere; then lines can only be typed
            import readline  # noqa: F401

    def read() -> str:
        if editing:
            try:
                return input(prompt)
            except (EOFError, KeyboardInterrupt):
                print()  # what comes next starts on a line of its own
                raise
        if person:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            line.encode()  # in the C locale, bytes that are no UTF-8 arrive as lone surrogates
        except UnicodeError as error:
            raise InputError("standard input is not UTF-8 text") from error
        if not line:
            raise EOFError
        return line

    return read


def show_written(result: Mapping[str, Any], *, text: bool, figures: bool) -> None:
    """Ends the line of a text that was written piece by piece (text), and says on stderr how fast it was (figures)."""
    if text:
        print(flush=True)
    if not figures:
        return
    if result["tokens"] is None:
        print("stopped", file=sys.stderr)
        return
    speed = "" if result["tok_s"] is None else f", {result['tok_s']:.1f} tokens/s after the first"
    print(f"{result['tokens']} tokens in {duration(result['seconds'])}{speed}", file=sys.stderr)
