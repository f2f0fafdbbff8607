"""Processes that need not import everything anew, and several of them as gloo ranks, as torchrun would start them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def ready_processes() -> Any:
    """Where processes come from that have imported everything already: only the first waits for it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ptq161.pipeline", "ptq161.evaluate.perplexity"])
    return context


def exit_code(function: Callable[..., object], *arguments: Any) -> int | None:
    """That of such a process, which calls `function(*arguments)`."""
    process = ready_processes().Process(target=function, args=arguments)
    process.start()
    process.join()
    code: int | None = process.exitcode
    return code


def on_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank; a string for a rank where it raises. `folder` is for files."""
    context = ready_processes()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = [folder / f"rank-{rank}.pt" for rank in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, port, results[rank], function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(result, weights_only=False) for result in results]


def _run(rank: int, count: int, port: int, result: Path, function: Callable[..., Any], arguments: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    from ptq161 import ranks

    try:
        with ranks.joined("cpu"):
            value = function(*arguments)
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
    torch.save(value, result)
