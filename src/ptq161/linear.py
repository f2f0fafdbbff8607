"""PackedLinear: the drop-in for `nn.Linear` that keeps its weight packed and computes through one op."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ptq161.binarize import reconstruct
from ptq161.kernels import (
    ReadyWeight,
    SharedProduct,
    TiledWeight,
    TileMemory,
    column_types,
    has_tiled_kernel,
    joined_layout,
    joined_tiles,
    linear,
    tile,
    tiled_linear,
    untile,
)
from ptq161.layout import PackedLinearSpec
from ptq161.packing import COLUMN_TYPES, PackedWeight, unpack


class PackedLinear(nn.Module):
    """y = x @ W.T + bias with W as packed column groups: (..., cols) -> (..., rows).

    Buffers carry the names of the checkpoint (`weight`, `scale_0`, `column_types`, ...; docs/format.md). They keep
    their dtypes whatever the module is cast to: only the bias follows `module.to(dtype)`. A linear that shares the
    column types of another (`spec.columns_from`) stores none; `share_columns` points it to their owner.

    Built empty, to be filled by `load_state_dict`, or from a packed weight by `of`. Where there are kernels (a CPU with
    native ones, a GPU with Triton), `tile` then exchanges the buffers for the order that these read (kernels/tiles.py),
    which makes products fast and takes the place of the stored order, not room beside it. State dicts, copies and moves
    to a device without kernels see the stored tensors all the same.

    `exact` (only with tiles, only on a CPU): activations stay float32 instead of int8 in blocks of 128 channels.
    """

    def __init__(
        self,
        spec: PackedLinearSpec,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = spec.layout.rows, spec.layout.cols
        for name, tensor in spec.specs().items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.exact = False
        # In a tuple, so that the owner does not become a submodule of this linear.
        self._columns_owner: tuple[PackedLinear, ...] = ()
        self._ready: ReadyWeight | None = None
        self._shared: tuple[SharedProduct, int] | None = None

    @classmethod
    def of(cls, packed: PackedWeight, bias: Tensor | None = None) -> "PackedLinear":
        """A linear that holds these tensors (not copies of them)."""
        module = cls(PackedLinearSpec(packed.layout), bias=bias is not None, device="meta")
        state = packed.tensors if bias is None else packed.tensors | {"bias": bias}
        module.load_state_dict(state, assign=True)
        return module

    def share_columns(self, owner: "PackedLinear") -> None:
        """Read the column types from `owner`, which sees the same input and stores them."""
        self._columns_owner = (owner,)

    @property
    def is_tiled(self) -> bool:
        """Whether the weight is in the order of the kernels."""
        return "tiles" in self._buffers

    @property
    def can_be_tiled(self) -> bool:
        """Whether `tile` would do something: the weight is in the stored order, on a device with kernels for tiles."""
        return not self.is_tiled and has_tiled_kernel(next(self.buffers()).device)

    def tile(self, memory: TileMemory | None = None) -> "PackedLinear":
        """Bring the weight into the order of the kernels, once, in place of the stored one; returns self.

        memory: where the linears of a model lie one behind the other; memory of its own if there is none.

        Does nothing where that would not help: on a device without such kernels.
        """
        if not self.can_be_tiled:
            return self
        if self.bias is not None and self.bias.data_ptr() % self.bias.element_size():
            self.bias.data = self.bias.data.clone()  # mapped from a file whose header ends at an odd byte
        tiled = tile(self.packed(), memory)
        order = tiled.order
        for owner in self._columns_owner:
            order = owner.tile(memory).get_buffer("order")
        self._replace_buffers({"tiles": tiled.tiles, "order": order, "col": tiled.col}, persistent=False)
        return self

    def packed(self) -> PackedWeight:
        """The packed weight: this module's own buffers, and the owner's column types where they are shared."""
        if self.is_tiled:
            return untile(self._tiled())
        tensors = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        for owner in self._columns_owner:
            tensors[COLUMN_TYPES] = owner._column_types()
        return PackedWeight(self.spec.layout, tensors)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """An `nn.Linear` with the reconstructed weight, unpacked once, in `dtype`."""
        weight = reconstruct(unpack(self.packed())).to(dtype)
        module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        module.weight = nn.Parameter(weight)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().to(dtype))
        return module.train(self.training)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """Multiply by the packed weight; the result is in x's dtype."""
        if "tiles" in self._buffers:
            if torch.compiler.is_compiling():
                return tiled_linear(x, self._tiled(), self.bias, exact=self.exact)
            if self._shared is not None:
                product, index = self._shared
                part = product.part(index, x, exact=self.exact)
                if part is not None:
                    return part
            return self._ready_weight().linear(x, self.bias, exact=self.exact)
        return linear(x, self.packed(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and code widths for `print(model)`."""
        groups = ", ".join(f"{group.cols} x {group.width}" for group in self.spec.layout.groups)
        rounded = self.is_tiled and self.get_buffer("tiles").device.type == "cpu"
        activations = ", activations=" + ("float32" if self.exact else "int8") if rounded else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, columns=({groups}){activations}"

    def _tiled(self) -> TiledWeight:
        buffers = self._buffers
        tiles = buffers["tiles"]
        assert tiles is not None
        return TiledWeight(self.spec.layout, tiles, buffers["order"], buffers["col"])

    def _ready_weight(self) -> ReadyWeight:
        """The tiles made ready for products; made anew when the module was given other tensors."""
        ready, buffers = self._ready, self._buffers
        if ready is None or any(getattr(ready.weight, name) is not buffers[name] for name in ("tiles", "order", "col")):
            ready = self._ready = ReadyWeight(self._tiled())
        return ready

    def __getstate__(self) -> dict[str, Any]:
        # Of copies and pickles: what is native stays here, and the copy makes its own.
        return self.__dict__ | {"_ready": None, "_shared": None}

    def _column_types(self) -> Tensor:
        if self.is_tiled:
            return column_types(self.spec.layout, self.get_buffer("order"))
        return self.get_buffer(COLUMN_TYPES)

    def _untile(self) -> None:
        if self.is_tiled:
            tensors = self.packed().tensors
            self._replace_buffers({name: tensors[name] for name in self.spec.specs()}, persistent=True)

    def _replace_buffers(self, tensors: Mapping[str, Tensor | None], *, persistent: bool) -> None:
        self._shared = None
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            tensors = self.packed().tensors
            destination |= {prefix + name: tensors[name] for name in self.spec.specs()}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._untile()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        # Behind .to(), .half(), .cuda() and the like: take the packed tensors along to a device, never to a dtype.
        if self.is_tiled and not has_tiled_kernel(fn(torch.empty(0)).device):
            self._untile()
        packed, self._shared = {id(buffer) for buffer in self._buffers.values()}, None

        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return tensor.to(applied.device) if id(tensor) in packed and applied.dtype != tensor.dtype else applied

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def share_product(linears: Sequence[PackedLinear]) -> None:
    """Let linears that see the same input be multiplied together where few tokens come; nothing if they do not fit.

    They fit in tiles, with the same column groups, and without column scales and biases.
    """
    layouts = [packed.spec.layout for packed in linears]
    layout = joined_layout(layouts)
    if layout is None or any(not packed.is_tiled or packed.bias is not None for packed in linears):
        return
    parts = [packed.get_buffer("tiles") for packed in linears]
    tiles = joined_tiles(parts)
    product = SharedProduct(TiledWeight(layout, tiles, linears[0]._buffers["order"], None), layouts)
    for index, part in enumerate(tiles.split([len(part) for part in parts])):
        linears[index].register_buffer("tiles", part, persistent=False)
        linears[index]._shared = (product, index)
