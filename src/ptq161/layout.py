"""The packed model as a whole: which linears, in which layout, sharing which column types; every size follows.

`ModelLayout` is what `config.json` carries under `quantization_config`, what an empty packed model is built from,
and what every bit count is computed from, whether predicted from a bare config or measured on a file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ptq161.binarize import CODE_WIDTHS
from ptq161.errors import CheckpointError
from ptq161.packing import COLUMN_TYPES, FORMAT_VERSION, GroupLayout, LinearLayout, TensorSpec


@dataclass(frozen=True)
class PackedLinearSpec:
    """One packed linear of a model. `columns_from` names the linear that stores the column types, if not this one."""

    layout: LinearLayout
    columns_from: str | None = None

    def specs(self) -> dict[str, TensorSpec]:
        """The tensors stored under this linear's own name."""
        specs = self.layout.specs()
        if self.columns_from is not None:
            specs.pop(COLUMN_TYPES, None)
        return specs


@dataclass(frozen=True)
class ModelLayout:
    """Module name -> packed linear, for every linear that is quantized.

    vocabulary: embedding and head, where they are stored at 8 bits. They are no part of the honest bits.
    """

    linears: Mapping[str, PackedLinearSpec]
    vocabulary: Mapping[str, PackedLinearSpec] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, PackedLinearSpec]:
        """Everything stored packed: the linears, then embedding and head."""
        return {**self.linears, **self.vocabulary}

    @property
    def quantized_weights(self) -> int:
        """Weights of all quantized linears: rows * cols, summed."""
        return sum(spec.layout.rows * spec.layout.cols for spec in self.linears.values())

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Full tensor name -> spec of every packed tensor."""
        return {f"{name}.{tensor}": s for name, spec in self.modules.items() for tensor, s in spec.specs().items()}

    def parts(self) -> dict[str, int]:
        """Bytes of the linears by part: codes_<width> for every width of the table, columns, scales."""
        counts = Counter({f"codes_{width}": 0 for width in CODE_WIDTHS} | {"columns": 0, "scales": 0})
        for spec in self.linears.values():
            for tensor in spec.specs().values():
                counts[tensor.part] += tensor.nbytes
        return dict(counts)

    @property
    def vocabulary_bits(self) -> float | None:
        """Bits per weight of embedding and head, scales included; None where they are not packed."""
        layouts = [spec.layout for spec in self.vocabulary.values()]
        stored = sum(tensor.nbytes for layout in layouts for tensor in layout.specs().values())
        return 8 * stored / sum(layout.rows * layout.cols for layout in layouts) if layouts else None

    @property
    def bits_per_weight(self) -> float:
        """Honest bits: 8 * stored bytes / quantized weights, every vector, mask and padding bit included."""
        return 8 * sum(self.parts().values()) / self.quantized_weights

    @property
    def paper_bits(self) -> float | None:
        """The paper's own count (Appendix A) averaged over the weights; None if a linear is not 4-bit + 1-bit."""
        total = 0.0
        for spec in self.linears.values():
            sizes = {group.width: group.cols for group in spec.layout.groups}
            if not sizes.keys() <= {"1bit", "4bit"}:
                return None
            rows, cols = spec.layout.rows, spec.layout.cols
            total += rows * cols * paper_bits(rows, cols, sizes.get("4bit", 0) / cols)
        return total / self.quantized_weights

    def to_dict(self) -> dict[str, Any]:
        """JSON form: distinct layouts once, then an index (and the owner of shared column types) per linear."""
        layouts = list(dict.fromkeys(spec.layout for spec in self.modules.values()))

        def entries(specs: Mapping[str, PackedLinearSpec]) -> dict[str, Any]:
            return {n: {"layout": layouts.index(s.layout), "columns_from": s.columns_from} for n, s in specs.items()}

        return {
            "format_version": FORMAT_VERSION,
            "layouts": [asdict(layout) for layout in layouts],
            "linears": entries(self.linears),
        } | ({"vocabulary": entries(self.vocabulary)} if self.vocabulary else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelLayout":
        """Read the JSON form. Raises CheckpointError for another format version or anything malformed."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"packed format version is {version!r}, this ptq161 reads version {FORMAT_VERSION}; "
                "install the ptq161 that wrote the checkpoint, or quantize again"
            )
        try:
            layouts = [_linear_layout(entry) for entry in data["layouts"]]
            linears = {name: _spec(entry, layouts) for name, entry in data["linears"].items()}
            vocabulary = {name: _spec(entry, layouts) for name, entry in data.get("vocabulary", {}).items()}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config is malformed: {error!r}") from error
        if not linears:
            raise CheckpointError("quantization_config is malformed: it lists no linear")
        for name, spec in linears.items():
            _check_owner(name, spec, linears)
        for name, spec in vocabulary.items():
            if spec != vocabulary_spec(spec.layout.rows, spec.layout.cols) or name in linears:
                raise CheckpointError(f"quantization_config is malformed: {name} is no embedding or head at 8 bits")
        return cls(linears, vocabulary)


def vocabulary_spec(rows: int, cols: int) -> PackedLinearSpec:
    """How an embedding or a head is packed: every row at 8 bits, with one scale."""
    return PackedLinearSpec(LinearLayout(rows, (GroupLayout("8bit", cols, zero=False, mean=False, col=False),)))


def paper_bits(rows: int, cols: int, salient_ratio: float) -> float:
    """Bits per weight by the paper's formula (Eq. 8, Appendix A).

    Overheads are divided by the number of weight *bits*, and the row mean and the 4-bit scales are left out: that is
    how the paper counts, not what a file holds (see docs/format.md).
    """
    weight_bits = (1 - salient_ratio) * 1 + salient_ratio * 4
    total_bits = rows * cols * weight_bits
    index_bits = cols / total_bits
    additional_bits = ((2 * rows + cols) * 16 + salient_ratio * cols * 16) / total_bits
    return weight_bits + index_bits + additional_bits


def _linear_layout(entry: Mapping[str, Any]) -> LinearLayout:
    groups = tuple(_group_layout(group) for group in entry["groups"])
    if not 1 <= len(groups) <= 16:
        raise ValueError(f"{len(groups)} column groups")
    return LinearLayout(_positive(entry["rows"], "rows"), groups)


def _group_layout(entry: Mapping[str, Any]) -> GroupLayout:
    if entry["width"] not in CODE_WIDTHS:
        raise ValueError(f"code width {entry['width']!r}")
    for flag in ("zero", "mean", "col"):
        if not isinstance(entry[flag], bool):
            raise ValueError(f"{flag}={entry[flag]!r}")
    return GroupLayout(
        entry["width"], _positive(entry["cols"], "cols"), zero=entry["zero"], mean=entry["mean"], col=entry["col"]
    )


def _positive(value: Any, name: str) -> int:
    # The bound keeps rows * cols far inside 64 bits, so that no size computed from a hostile file can wrap.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**28:
        raise ValueError(f"{name}={value!r}")
    return value


def _spec(entry: Mapping[str, Any], layouts: list[LinearLayout]) -> PackedLinearSpec:
    index, owner = entry["layout"], entry["columns_from"]
    if type(index) is not int or index < 0 or not (owner is None or isinstance(owner, str)):
        raise ValueError(f"linear entry {dict(entry)!r}")
    return PackedLinearSpec(layouts[index], owner)


def _check_owner(name: str, spec: PackedLinearSpec, linears: Mapping[str, PackedLinearSpec]) -> None:
    if spec.columns_from is None:
        return
    owner = linears.get(spec.columns_from)
    if owner is None or COLUMN_TYPES not in owner.specs():
        raise CheckpointError(f"{name} takes its column types from {spec.columns_from!r}, which stores none")
    sizes = [group.cols for group in spec.layout.groups]
    if sizes != [group.cols for group in owner.layout.groups]:
        raise CheckpointError(f"{name} and {spec.columns_from} share column types but not group sizes")
