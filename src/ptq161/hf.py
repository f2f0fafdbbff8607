"""Teaches transformers the packed format, and loads packed checkpoints.

Importing this module is enough for `AutoModelForCausalLM.from_pretrained(folder)`. `load` checks the whole folder
first, and can unpack the weights once instead of at every call.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq161.attention import fold_heads, unfold_heads
from ptq161.config import unknown
from ptq161.contents import headers_for
from ptq161.errors import CheckpointError, InputError
from ptq161.folder import CONFIG, METHOD, quantization_config
from ptq161.foreign import complaints, config_problem
from ptq161.kernels import TileMemory, has_fast_kernel
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.linear import PackedLinear, share_product
from ptq161.machine import available_memory_bytes, pick_device
from ptq161.packing import COLUMN_TYPES, problems
from ptq161.saving import save_packed
from ptq161.verify import Problem, folder_problems
from ptq161.vocabulary import install_dense, install_packed

__all__ = ["PackedConfig", "PackedQuantizer", "is_packed", "load", "save_packed"]

MODES = ("auto", "packed", "dense")
ACTIVATIONS = ("int8", "float32")


class Checked(StrEnum):
    """Who has checked the folder already. No JSON reads as a member of it, so no config.json can claim it."""

    BY_LOAD = "by ptq161.load"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint: the layout of its linears and their honest bits (docs/format.md).

    Raises CheckpointError for another format version or a malformed layout.
    """

    def __init__(
        self,
        *,
        bits_per_weight: float | None = None,
        ptq161_version: str | None = None,
        provenance: dict[str, Any] | None = None,
        checked: object = None,
        **layout: Any,
    ) -> None:
        # Of what else is there, `checksums` is left out on purpose: transformers writes this object when it saves the
        # model anew, and the new folder has no checksums.
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = self.layouts = self.linears = None
        self.__dict__ |= ModelLayout.from_dict(layout).to_dict()
        self.bits_per_weight = bits_per_weight
        self.ptq161_version = ptq161_version
        self.provenance = provenance
        self.checked = checked is Checked.BY_LOAD

    def to_dict(self) -> dict[str, Any]:
        """As it goes into a config.json that is saved anew."""
        return {key: value for key, value in super().to_dict().items() if key != "checked"}

    @property
    def layout(self) -> ModelLayout:
        """The packed linears by module name."""
        return ModelLayout.from_dict(self.__dict__)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty packed modules where the layout says, lets transformers fill them, and checks what it filled in."""

    quantization_config: PackedConfig
    requires_calibration = True  # a model is quantized by `ptq161 quantize`, never while it loads

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Refuse absurd sizes. Of what transformers calls here, this alone sees the config before a model is built."""
        if refused := config_problem(config.to_dict()):
            raise CheckpointError(f"{CONFIG}: {refused}")
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        layout, files = self.quantization_config.layout, [Path(file) for file in checkpoint_files or ()]
        given = str(model.config.name_or_path)
        local = os.path.isdir(given)
        folder = Path(given) if local else files[0].parent if files else None
        if folder is not None and not self.quantization_config.checked:
            _refuse(folder, folder_problems(folder, partial=not local))
        for name, spec in layout.linears.items():
            linear = _linear_to_replace(model, name, spec)
            bias = linear.bias is not None
            model.set_submodule(name, PackedLinear(spec, bias=bias, device="meta", dtype=linear.weight.dtype))
        install_packed(model, layout.vocabulary)
        for file in files:
            if file.parent != folder:
                raise CheckpointError(f"{file}: is not a file of {folder}")
        self.file_of = headers_for(model, layout, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        packed = {name: model.get_submodule(name) for name in self.quantization_config.layout.modules}
        memory = TileMemory()
        with ExitStack() as stack:
            files = {path: stack.enter_context(_open_to_read(path)) for path in set(self.file_of.values())}
            for name, linear in packed.items():
                assert isinstance(linear, PackedLinear)
                owner = packed.get(linear.spec.columns_from or "")
                if isinstance(owner, PackedLinear):
                    linear.share_columns(owner)
                if files and linear.can_be_tiled:
                    for tensor in linear.spec.specs():
                        full = f"{name}.{tensor}"
                        setattr(linear, tensor, files[self.file_of[full]].get_tensor(full))
                for tensor, what in problems(linear.spec.layout, linear.packed().tensors):
                    holder = linear.spec.columns_from if tensor == COLUMN_TYPES else None
                    full = f"{holder or name}.{tensor}"
                    file = self.file_of[full].name if full in self.file_of else "the checkpoint"
                    raise CheckpointError(f"{file}: tensor {full} {what}; run `ptq161 verify`")
                linear.tile(memory)
        _share_products(model, self.quantization_config.layout)
        fold_heads(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.quantization_config.layout.linears:
            packed = model.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            model.set_submodule(name, packed.dense(dtype or model.dtype))
        install_dense(model, dtype or model.dtype)
        unfold_heads(model)
        return model

    def is_serializable(self) -> bool:
        """`model.save_pretrained` writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed linears train: the op has a gradient for its input."""
        return True


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mode: str = "auto",
    activations: str = "int8",
) -> PreTrainedModel:
    """Load a packed checkpoint after checking every file and tensor of it.

    device: a torch device, or "auto" for the GPU if there is one. dtype: of activations and unquantized tensors
    (default: as stored). mode: "packed" keeps the weights packed, and without a fast kernel unpacks them at every
    call; "dense" unpacks each once, to `nn.Linear`; "auto" is dense where the device has no fast kernel and the dense
    weights fit in half of its available memory, else packed; embedding and head as the linears, where they are int8.
    activations: of packed linears on a CPU with native kernels, "int8" (rounded in blocks of 128 channels) or
    "float32"; an int8 head always multiplies float32 ones, and everything else computes in its dtype anyway.

    Raises CheckpointError naming file and tensor if anything is missing, damaged or of another format version.
    """
    if mode not in MODES:
        raise InputError(unknown("mode", mode, MODES))
    if activations not in ACTIVATIONS:
        raise InputError(unknown("activations", activations, ACTIVATIONS))
    folder, device = Path(path), pick_device(str(device))
    _refuse(folder, folder_problems(folder))
    layout = ModelLayout.from_dict(quantization_config(folder))
    model = _from_pretrained(folder, dtype)
    model.to(device)  # type: ignore[arg-type]
    if mode == "dense" or (mode == "auto" and _better_dense(layout, device, model.dtype)):
        model.dequantize(model.dtype)
    for name in layout.linears:
        module = model.get_submodule(name)
        if isinstance(module, PackedLinear):
            # Tiled after a move: a GPU may have kernels where the CPU has none.
            module.tile().exact = activations == "float32"
    _share_products(model, layout)
    return model


def is_packed(path: str | Path) -> bool:
    """Whether the folder claims to be a packed checkpoint, sound or not."""
    try:
        quantization_config(Path(path))
    except CheckpointError:
        return False
    return True


def _refuse(folder: Path, found: list[Problem]) -> None:
    if found:
        more = f" (and {len(found) - 1} more problems, see `ptq161 verify`)" if len(found) > 1 else ""
        raise CheckpointError(f"cannot load {folder}: {found[0]}{more}")


def _from_pretrained(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    trusting_nothing: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with complaints(f"{folder / CONFIG}: transformers cannot build this model", CheckpointError):
        config = AutoConfig.from_pretrained(folder, **trusting_nothing)
        config.quantization_config["checked"] = Checked.BY_LOAD
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            **trusting_nothing,
        )
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys"):
        for tensor in sorted(info[kind]):
            what = "is missing" if kind == "missing_keys" else "does not belong to this model"
            raise CheckpointError(f"{folder}: tensor {tensor} {what}")
    assert isinstance(model, PreTrainedModel)
    return model


def _share_products(model: PreTrainedModel, layout: ModelLayout) -> None:
    """Linears with the same column types see the same input: multiply them together."""
    together: dict[str, list[PackedLinear]] = {}
    for name, spec in layout.linears.items():
        module = model.get_submodule(name)
        if isinstance(module, PackedLinear):
            together.setdefault(spec.columns_from or name, []).append(module)
    for linears in together.values():
        if len(linears) > 1:
            share_product(linears)


def _better_dense(layout: ModelLayout, device: torch.device, dtype: torch.dtype) -> bool:
    if has_fast_kernel(device):
        return False
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    weights = sum(spec.layout.rows * spec.layout.cols for spec in layout.modules.values())
    return available is not None and weights * dtype.itemsize <= available // 2


def _linear_to_replace(model: PreTrainedModel, name: str, spec: PackedLinearSpec) -> nn.Linear:
    shape = (spec.layout.rows, spec.layout.cols)
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
        found = "nothing" if linear is None else f"{linear}"
        raise CheckpointError(
            f"{CONFIG}: packed linear {name} of shape {shape} has no place in {type(model).__name__}, which has "
            f"{found} there; load it as the class that config.json names under architectures"
        )
    return linear


def _open_to_read(path: Path) -> Any:
    """A weight file whose tensors are read into memory of their own.

    transformers maps the files, and a mapping stays as long as one tensor of it is in use: the rows that were brought
    into tiles would stay in memory with the embedding. So the mapped ones are not touched, and read anew here.
    """
    return safe_open(path, framework="pt", backend="pread")
