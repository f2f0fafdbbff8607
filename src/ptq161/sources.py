"""Open any MODEL: a hub name, a Hugging Face folder, a `.gguf` file, or a packed checkpoint of ours."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import gguf
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.accelerate import accelerate_disk_offload
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils import logging

from ptq161.config import unknown
from ptq161.contents import TORCH_DTYPES
from ptq161.dense import DenseModel, Place, StoredTensors
from ptq161.errors import InputError, UnsupportedModel
from ptq161.foreign import complaints, config_problem
from ptq161.hf import MODES, is_packed, load
from ptq161.hub import hub_reachable

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class _Location:
    """Where transformers finds a model: `given` by the user, the first argument and keywords of `from_pretrained`.

    gguf_calls: in place of the gguf package's own. With those, transformers parses all of a file's header, vocabulary
    included, for each part of a model and several times for some, and lists an architecture's names of tensors for
    every module; these do so once.
    """

    given: str
    name: str
    gguf_file: str | None = None
    local_only: bool = True
    gguf_calls: dict[str, Callable[..., Any]] = field(
        default_factory=lambda: {name: cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    )

    @property
    def keywords(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the name. Code that a model brings along is never run."""
        keywords = {"local_files_only": self.local_only, "trust_remote_code": False}
        return keywords | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def open_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mode: str = "auto",
    activations: str = "int8",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any model with its tokenizer, ready to run on `device`.

    dtype: None keeps what is stored (float32 for a GGUF). mode, activations: how a packed checkpoint computes, see
    `hf.load`; a dense model is always dense.

    Raises InputError (UnsupportedModel, CheckpointError) if there is no such model or it cannot be loaded.
    """
    if mode not in MODES:
        raise InputError(unknown("mode", mode, MODES))
    if is_packed(path):
        with _quiet(bars=False):
            model = load(path, device=device, dtype=dtype, mode=mode, activations=activations)
        return model, _tokenizer(_Location(str(path), str(path)), model.config)
    if mode == "packed":
        raise InputError(f"{path} is not a packed ptq161 checkpoint: mode 'packed' needs one, use 'auto'")
    location = _locate(path)
    config = _config(location)
    tokenizer = _tokenizer(location, config)
    return _model(location, config, dtype).to(device), tokenizer  # type: ignore[arg-type]


def open_dense(path: str | Path, dtype: torch.dtype | None = None) -> tuple[DenseModel, PreTrainedTokenizerBase]:
    """A model to be quantized, in `dtype` or as stored, and its tokenizer.

    Weights in safetensors files are only located, to be read when asked for. Everything else is read whole: a GGUF (as
    its float32 dequantization), a `.bin`, or a checkpoint that transformers converts while it loads.

    Raises InputError if it cannot be loaded, or is quantized already.
    """
    if is_packed(path):
        raise InputError(f"{path} is a packed ptq161 checkpoint: give the model it was made from")
    location = _locate(path)
    config = _config(location)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "an unnamed method")
        raise InputError(f"{path} is quantized already ({method}): give the full-precision model it was made from")
    tokenizer = _tokenizer(location, config)
    located = None if location.gguf_file else _located(location, config, dtype)
    if located is not None:
        return located, tokenizer
    model = _model(location, config, dtype)
    return DenseModel.of(model, torch.float32 if location.gguf_file else None), tokenizer


def open_config(path: str | Path) -> PreTrainedConfig:
    """The configuration alone, from any MODEL or a bare `config.json`. Raises InputError if there is none."""
    given = Path(path)
    if given.suffix == ".json" and given.is_file():
        return _config(_Location(str(path), str(path)))
    return _config(_locate(path))


def _locate(path: str | Path) -> _Location:
    """Tell apart a folder, a GGUF file and a hub name."""
    local, given = Path(path), str(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            inside = sorted(local.glob("*.gguf"))
            hint = f"; did you mean {inside[0]}?" if inside else ""
            raise InputError(f"{given} is a folder without config.json: expected a Hugging Face model folder{hint}")
        return _Location(given, given)
    if local.exists():
        try:
            with local.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise InputError(f"cannot read {given}: {error.strerror}") from error
        if local.suffix.lower() != ".gguf" or magic != b"GGUF":
            raise InputError(f"{given} is not a GGUF file: expected one, a Hugging Face folder or a hub name")
        return _Location(given, str(local.parent), gguf_file=local.name)
    if isinstance(path, Path) or not _HUB_NAME.fullmatch(given) or local.suffix in (".gguf", ".json"):
        raise InputError(f"{given} does not exist: expected a Hugging Face folder, a .gguf file or a hub name")
    return _Location(given, given, local_only=not hub_reachable())


def _config(location: _Location) -> PreTrainedConfig:
    with _loading("configuration", location):
        if refused := config_problem(PreTrainedConfig.get_config_dict(location.name, **location.keywords)[0]):
            raise InputError(f"the configuration of {location.given} {refused}")
        config: PreTrainedConfig = AutoConfig.from_pretrained(location.name, **location.keywords)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{location.given} is a {config.model_type} model: expected a decoder that predicts the next token"
        )
    return config


def _model(location: _Location, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    stored = torch.float32 if location.gguf_file else "auto"
    with _loading("weights", location):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location.name,
            config=config,
            dtype=stored if dtype is None else dtype,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **location.keywords,
        )
    model: PreTrainedModel = loaded[0]
    report = loaded[1]
    for problem, names in (("lacks", report["missing_keys"]), ("has the wrong shape for", report["mismatched_keys"])):
        if names:
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise InputError(f"{location.given} {problem} {first} ({len(names)} tensors in all): the file is damaged")
    if location.gguf_file:
        _forget_gguf(model)
    return model


def _located(location: _Location, config: PreTrainedConfig, dtype: torch.dtype | None) -> DenseModel | None:
    """A model whose weights stay in their safetensors files; None for one that transformers has to load by itself.

    Names, ties and generation settings are worked out by the functions that `from_pretrained` uses for a model that is
    offloaded to the disk; unlike that it maps no file before a weight of it is needed.
    """
    with _loading("weights", location):
        keywords: Any = location.keywords
        files, metadata = _get_resolved_checkpoint_files(
            location.name, None, None, None, None, False, download_kwargs=keywords
        )
        if not files or not all(file.endswith(".safetensors") for file in files):
            return None
        headers = _headers(files)
        stored = dtype or config.dtype or next((t.dtype for t in headers.values() if t.dtype.is_floating_point), None)
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=stored)
        model.tie_weights(recompute_mapping=False)  # every parameter that came to be above is one of its own
        mapping = get_model_conversion_mapping(model)
        converted = any(not isinstance(change, WeightRenaming) for change in mapping)
        if converted or model._get_dtype_plan(model.dtype):  # the latter: some weights are kept in another dtype
            return None
        index: Any = accelerate_disk_offload(model, None, files, {"": "disk"}, metadata, mapping)
        places = {
            name: Place(Path(entry["safetensors_file"]), entry["weight_name"], getattr(torch, entry["dtype"]))
            for name, entry in index.items()
        }
        expected = model.state_dict()
        if any(name not in places or headers[places[name].name].shape != t.shape for name, t in expected.items()):
            return None  # which then says what is missing or misshapen
        weights = StoredTensors({name: places[name] for name in expected})
        for name, source in model.all_tied_weights_keys.items():
            if places[name] != places[source] and not weights[name].equal(weights[source]):
                return None
        if model.can_generate():
            nothing = dict.fromkeys(("cache_dir", "force_download", "proxies", "token"))
            model.adjust_generation_fn(  # type: ignore[operator]
                None, False, False, location.name, revision="main", subfolder="", **nothing, **keywords
            )
    return DenseModel(model.requires_grad_(False).eval(), weights, model.dtype, resident=False)


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, `torch.empty` makes nothing: `init_empty_weights` drops each weight only after it was allocated.

    Dropped like that, many large weights leave holes that take address space, and a limit on that is soon reached.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        return function(*args, **keywords | ({"device": "meta"} if function is torch.empty else {}))


def _headers(files: Sequence[str]) -> dict[str, Tensor]:
    """Stored name -> tensor without values, of all files; each is opened and closed in turn."""
    headers = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                dtype = TORCH_DTYPES.get(
                    header.get_dtype(), torch.uint8
                )  # any that is no float's, for one unknown here
                headers[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    return headers


def _forget_gguf(model: PreTrainedModel) -> None:
    """Its weights are plain float32 now, but transformers would refuse to save a model marked as a GGUF's."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)


def _tokenizer(location: _Location, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    with _loading("tokenizer", location):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location.name, config=config, **location.keywords
        )
    if location.gguf_file:
        tokenizer.clean_up_tokenization_spaces = False  # decoding would note that it ignores True here
        # transformers 5.17 gives a GGUF's tokenizer its BOS as EOS; the configuration has them right.
        for role in ("bos_token", "eos_token", "pad_token"):
            index = getattr(config, f"{role}_id", None)
            if index is not None:
                setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(index))
    return tokenizer


@contextmanager
def _loading(part: str, location: _Location) -> Iterator[None]:
    """Turns whatever transformers raises inside into one line that names the model and the part."""
    what = f"cannot load the {part} of {location.given}"
    if location.name == location.given and not Path(location.given).exists():
        what = f"{location.given} is neither a local folder or file nor a model from the Hugging Face hub"
    originals = {name: getattr(gguf, name) for name in location.gguf_calls}
    vars(gguf).update(location.gguf_calls)
    try:
        with complaints(what), _quiet(bars=not location.local_only):
            yield
    finally:
        vars(gguf).update(originals)


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Keeps transformers' notes off stderr, and every tqdm bar unless something is downloaded.

    The GGUF reader's bar has no switch of its own, hence the change to tqdm itself, undone at the end.
    """
    verbosity, begin = logging.get_verbosity(), tqdm.__init__
    logging.set_verbosity_error()
    if not bars:
        tqdm.__init__ = partialmethod(begin, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        tqdm.__init__ = begin
