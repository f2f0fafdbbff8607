"""How fast a packed model is against its own dense weights: Hugging Face `generate`, interleaved, one process."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ptq161.errors import InputError
from ptq161.hf import is_packed, load
from ptq161.kernels import cpu_kernels
from ptq161.linear import PackedLinear
from ptq161.machine import available_memory_bytes, recent_peak_rss_bytes, reset_peak_rss, resident_bytes

CONTENDERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Turn:
    """Seconds of one contender's turn: until the first new token, and of each further one; by the clock and the CPU."""

    prefill: float
    token: float
    prefill_cpu: float
    token_cpu: float


def bench_model(
    path: str | Path,
    *,
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 32,
    rounds: int = 3,
    dense: Sequence[str] = (),
) -> dict[str, Any]:
    """Decode and prefill speed of a packed checkpoint and of its dense reconstruction in the `dense` dtypes.

    Prompts are random tokens; generation is greedy and never stops early. Activations of packed linears are int8 and
    everything not packed is in the dtype it is stored in; against a dense model in another dtype there is a second
    packed one, with embedding, head and the rest in that dtype, so that each comparison has the same head. A dense
    contender that does not fit into the available memory is refused rather than left out.

    Returns the command's JSON; tokens/s are medians of rounds, from the clock and, with one thread, from the time that
    the process ran. Memory is growth over the process before loading: its peak while loading, and after the first
    answer, key-value cache included.

    Raises InputError for a folder that is not packed, sizes out of range, or too little memory.
    """
    if not is_packed(path):
        raise InputError(f"{path} is not a packed ptq161 checkpoint: quantize a model first, or use --shape ROWSxCOLS")
    sizes = {"new-tokens": new_tokens - 1, "rounds": rounds} | {"prompt-tokens": min(prompt_tokens, default=0)}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} is out of range: expected {2 if name == 'new-tokens' else 1} or more")
    packed, loading = _load_measured(path)
    prompts = _prompts(packed, prompt_tokens)
    _turn(packed, prompts[0], 2)
    before, resident = loading.pop("before"), resident_bytes()
    loading["resident_bytes"] = None if before is None or resident is None else resident - before
    models, pairs = _contenders(path, packed, dense)
    turns = _interleaved(models, prompts, new_tokens, rounds)
    measured = [_row(name, count, turns[name, count]) for count in prompt_tokens for name in models]
    first = {row["weights"]: row for row in measured[: len(models)]}
    speedups = {name: first[ours]["decode_tok_s"] / first[name]["decode_tok_s"] for name, ours in pairs.items()}
    weight_bytes, decode = _linear_bytes(packed), first["packed"]["decode_tok_s"]
    return {
        "model": str(path),
        "threads": torch.get_num_threads(),
        "kernels": list(cpu_kernels()),
        "prompt_tokens": list(prompt_tokens),
        "new_tokens": new_tokens,
        "measured": measured,
        **loading,
        "weight_bytes": weight_bytes,
        "decode_tok_s": decode,
        "prefill_tok_s": first["packed"]["prefill_tok_s"],
        "dense_decode_tok_s": max((first[name]["decode_tok_s"] for name in pairs), default=None),
        "speedups": speedups,
        "speedup": min(speedups.values(), default=None),
        "gb_s": 1e-9 * weight_bytes * decode,
    }


def _load_measured(path: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The packed model, and what loading it took."""
    before = reset_peak_rss()
    began, began_cpu = time.perf_counter(), time.process_time()
    model = load(path, mode="packed")
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = recent_peak_rss_bytes()
    return model, {
        "file_bytes": sum(file.stat().st_size for file in Path(path).glob("*.safetensors")),
        "load_seconds": seconds,
        "load_cpu_seconds": cpu,
        "load_peak_bytes": None if before is None or peak is None else peak - before,
        "before": before,
    }


def _prompts(model: PreTrainedModel, lengths: Sequence[int]) -> list[Tensor]:
    vocabulary = model.get_input_embeddings().num_embeddings
    assert isinstance(vocabulary, int)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in lengths]


def _contenders(
    path: str | Path, packed: PreTrainedModel, dense: Sequence[str]
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """Models by name; and which packed one has the same head as each dense one."""
    models, pairs = {"packed": packed}, {}
    for name in dense:
        _check_memory(packed, name)
        pairs[name] = "packed"
        if CONTENDERS[name] != packed.dtype:
            pairs[name] = f"packed, rest {name}"
            models[pairs[name]] = load(path, mode="packed", dtype=CONTENDERS[name])
        models[name] = load(path, mode="dense", dtype=CONTENDERS[name])
    return models, pairs


def _interleaved(
    models: Mapping[str, PreTrainedModel], prompts: Sequence[Tensor], new_tokens: int, rounds: int
) -> dict[tuple[str, int], list[_Turn]]:
    """The turns of every model with every prompt; a first round only warms up."""
    turns: dict[tuple[str, int], list[_Turn]] = {}
    for index in range(rounds + 1):
        for prompt in prompts:
            for name, model in models.items():
                turn = _turn(model, prompt, new_tokens if index else 2)
                if index:
                    turns.setdefault((name, prompt.shape[1]), []).append(turn)
    return turns


def _turn(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> _Turn:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # a setting of None for one call would mean the model's
    settings = {"do_sample": False, "pad_token_id": 0}
    clock, cpu = [], []
    for count in (1, new_tokens):
        began, began_cpu = time.perf_counter(), time.process_time()
        output = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(max_new_tokens=count, **settings),
        )
        cpu.append(time.process_time() - began_cpu)
        clock.append(time.perf_counter() - began)
        assert output.shape[1] == prompt.shape[1] + count
    token, token_cpu = ((times[1] - times[0]) / (new_tokens - 1) for times in (clock, cpu))
    return _Turn(clock[0], max(token, 1e-9), cpu[0], max(token_cpu, 1e-9))


def _row(name: str, prompt_tokens: int, turns: Sequence[_Turn]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "weights": name,
        "prompt_tokens": prompt_tokens,
        "prefill_tok_s": prompt_tokens / median(turn.prefill for turn in turns),
        "decode_tok_s": 1 / median(turn.token for turn in turns),
        "prefill_cpu_tok_s": None,
        "decode_cpu_tok_s": None,
    }
    if torch.get_num_threads() == 1:
        row["prefill_cpu_tok_s"] = prompt_tokens / median(turn.prefill_cpu for turn in turns)
        row["decode_cpu_tok_s"] = 1 / median(turn.token_cpu for turn in turns)
    return row


def _linear_bytes(model: PreTrainedModel) -> int:
    """Stored bytes of the packed linears in the decoder blocks: what a token must at least read besides the head."""
    quantizer: Any = model.hf_quantizer
    return sum(quantizer.quantization_config.layout.parts().values())


def _check_memory(model: PreTrainedModel, name: str) -> None:
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    needed = (weights + sum(p.numel() for p in model.parameters())) * CONTENDERS[name].itemsize
    available = available_memory_bytes()
    if available is not None and needed > 0.8 * available:
        raise InputError(
            f"the dense {name} model needs {needed / 2**30:.1f} GiB of {available / 2**30:.1f} available: "
            "use --dense none, or --dense bfloat16"
        )
