"""Teaches transformers the packed format, and loads packed checkpoints.

Importing this module is enough for `AutoModelForCausalLM.from_pretrained(folder)`. `load` checks the whole folder
first, and can unpack the weights once instead of at every call.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptq161.config import unknown
from ptq161.errors import CheckpointError, InputError
from ptq161.folder import CONFIG, METHOD, path_problem, quantization_config
from ptq161.kernels import has_fast_kernel
from ptq161.layout import ModelLayout, PackedLinearSpec
from ptq161.linear import PackedLinear
from ptq161.machine import available_memory_bytes, pick_device
from ptq161.packing import COLUMN_TYPES, problems
from ptq161.saving import save_packed
from ptq161.verify import folder_problems

__all__ = ["PackedConfig", "PackedQuantizer", "is_packed", "load", "save_packed"]

MODES = ("auto", "packed", "dense")
ACTIVATIONS = ("int8", "float32")
HEADER_DTYPES = {"U8": torch.uint8, "F16": torch.float16}  # the only ones that a packed linear stores


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

    @property
    def layout(self) -> ModelLayout:
        """The packed linears by module name."""
        return ModelLayout.from_dict(self.__dict__)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty PackedLinears where the layout says, lets transformers fill them, and checks what it filled in."""

    quantization_config: PackedConfig
    requires_calibration = True  # a model is quantized by `ptq161 quantize`, never while it loads

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        layout = self.quantization_config.layout
        for name, spec in layout.linears.items():
            linear = _linear_to_replace(model, name, spec)
            bias = linear.bias is not None
            model.set_submodule(name, PackedLinear(spec, bias=bias, device="meta", dtype=linear.weight.dtype))
        self.file_of = _checked_headers(model, layout, checkpoint_files or ())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        packed = {name: model.get_submodule(name) for name in self.quantization_config.layout.linears}
        for name, linear in packed.items():
            assert isinstance(linear, PackedLinear)
            owner = packed.get(linear.spec.columns_from or "")
            if isinstance(owner, PackedLinear):
                linear.share_columns(owner)
            for tensor, what in problems(linear.spec.layout, linear.packed().tensors):
                holder = linear.spec.columns_from if tensor == COLUMN_TYPES else None
                path = f"{holder or name}.{tensor}"
                file = self.file_of.get(path, "the checkpoint")
                raise CheckpointError(f"{file}: tensor {path} {what}; run `ptq161 verify`")
        for linear in packed.values():
            linear.tile()  # type: ignore[operator]

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.quantization_config.layout.linears:
            packed = model.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            model.set_submodule(name, packed.dense(dtype or model.dtype))
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
    weights fit in half of its available memory, else packed. activations: of packed weights on a CPU with native
    kernels, "int8" (rounded in blocks of 128 channels) or "float32"; everything else computes in its dtype anyway.

    Raises CheckpointError naming file and tensor if anything is missing, damaged or of another format version.
    """
    if mode not in MODES:
        raise InputError(unknown("mode", mode, MODES))
    if activations not in ACTIVATIONS:
        raise InputError(unknown("activations", activations, ACTIVATIONS))
    folder, device = Path(path), pick_device(str(device))
    found = folder_problems(folder)
    if found:
        more = f" (and {len(found) - 1} more problems, see `ptq161 verify`)" if len(found) > 1 else ""
        raise CheckpointError(f"cannot load {folder}: {found[0]}{more}")
    layout = ModelLayout.from_dict(quantization_config(folder))
    model = _from_pretrained(folder, dtype)
    model.to(device)  # type: ignore[arg-type]
    if mode == "dense" or (mode == "auto" and _better_dense(layout, device, model.dtype)):
        model.dequantize(model.dtype)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.tile().exact = (
                activations == "float32"
            )  # after a move: a GPU may have kernels where the CPU has none
    return model


def is_packed(path: str | Path) -> bool:
    """Whether the folder claims to be a packed checkpoint, sound or not."""
    try:
        quantization_config(Path(path))
    except CheckpointError:
        return False
    return True


def _from_pretrained(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except CheckpointError:
        raise
    except (KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: transformers cannot build this model: {error}") from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys"):
        for tensor in sorted(info[kind]):
            what = "is missing" if kind == "missing_keys" else "does not belong to this model"
            raise CheckpointError(f"{folder}: tensor {tensor} {what}")
    assert isinstance(model, PreTrainedModel)
    return model


def _better_dense(layout: ModelLayout, device: torch.device, dtype: torch.dtype) -> bool:
    if has_fast_kernel(device):
        return False
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    return available is not None and layout.quantized_weights * dtype.itemsize <= available // 2


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


def _checked_headers(model: PreTrainedModel, layout: ModelLayout, files: Iterable[str]) -> dict[str, str]:
    """Tensor -> file name, from the headers alone, once they fit the model.

    transformers compares no shapes for a quantized model, and starts missing tensors at random with a warning.
    Raises CheckpointError.
    """
    specs, shapes = layout.tensor_specs(), {name: tuple(t.shape) for name, t in model.state_dict().items()}
    file_of: dict[str, str] = {}
    root = model.config.name_or_path or ""
    for path in map(str, files):
        folder = root if os.path.isdir(root) else os.path.dirname(path)
        file = os.path.relpath(path, folder)
        refused = path_problem(Path(folder), file)
        if refused is None and not file.endswith(".safetensors"):
            refused = "is not safetensors; packed weights are read from no other kind of file"
        if refused is not None:
            raise CheckpointError(f"{file}: {refused}")
        try:
            with safe_open(path, framework="pt") as handle:
                headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                for name, header in headers.items():
                    file_of[name] = file
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    if name in shapes and shape != shapes[name]:
                        raise CheckpointError(f"{file}: tensor {name} is {list(shape)}, expected {list(shapes[name])}")
                    if name in specs and HEADER_DTYPES.get(dtype) != specs[name].dtype:
                        raise CheckpointError(f"{file}: tensor {name} is {dtype}, expected {specs[name].dtype}")
        except SafetensorError as error:
            raise CheckpointError(f"{file}: is not a readable safetensors file: {error}") from error
    missing = sorted(specs.keys() - file_of.keys()) if file_of else []
    if missing:
        raise CheckpointError(f"{next(iter(file_of.values()))}: tensor {missing[0]} is missing; run `ptq161 verify`")
    return file_of
