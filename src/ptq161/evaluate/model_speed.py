"""How fast a packed model is against its own dense weights: Hugging Face `generate`, interleaved, one process."""

import time
from collections.abc import Sequence
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
from ptq161.machine import available_memory_bytes, resident_bytes

CONTENDERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench_model(
    path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 32, rounds: int = 3, dense: Sequence[str] = ()
) -> dict[str, Any]:
    """Decode and prefill speed of a packed checkpoint and of its dense reconstruction in the `dense` dtypes.

    Prompts are random tokens; generation is greedy and never stops early. A dense contender that does not fit into
    the available memory is refused rather than left out. Returns the command's JSON; tokens/s are medians of rounds.
    Activations are int8 and everything not packed is in the dtype it is stored in.

    Raises InputError for a folder that is not packed, sizes out of range, or too little memory.
    """
    if not is_packed(path):
        raise InputError(f"{path} is not a packed ptq161 checkpoint: quantize a model first, or use --shape ROWSxCOLS")
    for name, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens - 1), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name} is out of range: expected {2 if name == 'new-tokens' else 1} or more")
    before, began = resident_bytes(), time.perf_counter()
    models = {"packed": load(path, mode="packed")}
    loading, grown = time.perf_counter() - began, None if before is None else (resident_bytes() or 0) - before
    weight_bytes = _linear_bytes(models["packed"])
    for name in dense:
        _check_memory(models["packed"], name)
        models[name] = load(path, mode="dense", dtype=CONTENDERS[name])
    vocabulary = models["packed"].get_input_embeddings().num_embeddings
    assert isinstance(vocabulary, int)
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            speed = _speeds(model, prompt, new_tokens if turn else 2)
            if turn:  # the first round only warms up
                speeds[name].append(speed)
    rows: list[dict[str, Any]] = [
        {
            "weights": name,
            "prefill_tok_s": median(prefill for prefill, _ in pairs),
            "decode_tok_s": median(decode for _, decode in pairs),
        }
        for name, pairs in speeds.items()
    ]
    packed, fastest = rows[0], max((row["decode_tok_s"] for row in rows[1:]), default=None)
    return {
        "model": str(path),
        "threads": torch.get_num_threads(),
        "kernels": list(cpu_kernels()),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "measured": rows,
        "load_seconds": loading,
        "resident_bytes": grown,
        "weight_bytes": weight_bytes,
        "decode_tok_s": packed["decode_tok_s"],
        "prefill_tok_s": packed["prefill_tok_s"],
        "dense_decode_tok_s": fastest,
        "speedup": None if fastest is None else packed["decode_tok_s"] / fastest,
        "gb_s": 1e-9 * weight_bytes * packed["decode_tok_s"],
    }


def _speeds(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens per second of the prompt, up to the first new token, and of every further one."""
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seconds = []
    for count in (1, new_tokens):
        began = time.perf_counter()
        output = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(max_new_tokens=count, min_new_tokens=count, **settings),
        )
        seconds.append(time.perf_counter() - began)
        assert output.shape[1] == prompt.shape[1] + count
    return prompt.shape[1] / seconds[0], (new_tokens - 1) / max(seconds[1] - seconds[0], 1e-9)


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
