"""A model's vocabulary matrices, input embedding and head: found, packed at 8 bits, put into a model that loads.

Both are (vocabulary, hidden). Where the model ties them they are one matrix, stored once under the embedding's name.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq161.binarize import EIGHT_BIT, symmetric_weight
from ptq161.embedding import PackedEmbedding, TiedHead
from ptq161.errors import CheckpointError, NonFiniteError, UnsupportedModule
from ptq161.head import DenseHead
from ptq161.layout import PackedLinearSpec, vocabulary_spec
from ptq161.linear import PackedLinear
from ptq161.packing import pack

_WEIGHTS_AT_ONCE = 1 << 22


def vocabulary_specs(model: PreTrainedModel) -> dict[str, PackedLinearSpec]:
    """Module name -> how it is packed, for the embedding and, unless it is tied to it, the head.

    Raises UnsupportedModule if the model keeps one of them in a module whose product or look-up is not known here.
    """
    embedding_name, embedding = _embedding(model)
    specs = {embedding_name: vocabulary_spec(embedding.num_embeddings, embedding.embedding_dim)}
    head_name, head = _head(model)
    if not _is_tied(model, head_name):
        specs[head_name] = vocabulary_spec(head.out_features, head.in_features)
    return specs


def pack_vocabulary(weights: Mapping[str, Tensor], specs: Mapping[str, PackedLinearSpec]) -> dict[str, Tensor]:
    """Full tensor name -> packed tensor, for the modules of `vocabulary_specs`. A few rows at a time are in float32.

    weights: a model's, by name. Raises NonFiniteError naming the first row of a module that has no finite scale.
    """
    packed: dict[str, Tensor] = {}
    for name, spec in specs.items():
        weight = weights[f"{name}.weight"].detach()
        rows = max(1, _WEIGHTS_AT_ONCE // spec.layout.cols)
        parts = [pack(symmetric_weight(part, EIGHT_BIT)).tensors for part in weight.split(rows)]
        tensors = {tensor: torch.cat([part[tensor] for part in parts]) for tensor in spec.specs()}
        bad = (~tensors["scale_0"].isfinite()).nonzero()
        if len(bad):
            raise NonFiniteError(f"{name}.weight: row {int(bad[0])} has NaN, infinite or huge weights: not for int8")
        packed |= {f"{name}.{tensor}": value for tensor, value in tensors.items()}
    return packed


def install_packed(model: PreTrainedModel, vocabulary: Mapping[str, PackedLinearSpec]) -> None:
    """Put empty packed modules in place of embedding and head, to be filled by transformers.

    With none of them packed, the head becomes one that reads its weight faster.

    Raises CheckpointError if `vocabulary` does not name this model's own, with their shapes.
    """
    if not vocabulary:
        head = model.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None:
            model.set_submodule(_name_of(model, head), DenseHead.of(head))
        return
    try:
        (embedding_name, embedding), (head_name, head) = _embedding(model), _head(model)
    except UnsupportedModule as error:
        raise CheckpointError(f"config.json has an int8 head, but {error}") from error
    shapes = {name: (spec.layout.rows, spec.layout.cols) for name, spec in vocabulary.items()}
    tied = head_name not in vocabulary and f"{head_name}.weight" in model.all_tied_weights_keys
    expected = {embedding_name: tuple(embedding.weight.shape)}
    expected |= {} if tied else {head_name: tuple(head.weight.shape)}
    if shapes != expected:
        raise CheckpointError(f"config.json has {shapes} under vocabulary; {type(model).__name__} has {expected}")
    dtype = embedding.weight.dtype
    packed = PackedEmbedding(vocabulary[embedding_name], factor=_factor(embedding), dtype=dtype, device="meta")
    model.set_submodule(embedding_name, packed)
    if tied:
        model.set_submodule(head_name, TiedHead(packed, head.bias))
    else:
        bias = head.bias is not None
        packed_head = PackedLinear(vocabulary[head_name], bias=bias, device="meta", dtype=dtype)
        packed_head.exact = True
        model.set_submodule(head_name, packed_head)
    # There is no parameter left to tie, and transformers would look for one.
    _set_ties(model, {name: source for name, source in _ties(model).items() if name != f"{head_name}.weight"})


def install_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The reverse, after loading: embedding and head dense in `dtype`, tied as they were."""
    packed, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, DenseHead):
        model.set_submodule(_name_of(model, head), head.plain())
    if not isinstance(packed, PackedEmbedding):
        return
    embedding = packed.dense_embedding(dtype)
    model.set_submodule(_name_of(model, packed), embedding)
    head_name = _name_of(model, head)
    if isinstance(head, PackedLinear):
        model.set_submodule(head_name, head.dense(dtype))
        return
    assert isinstance(head, TiedHead)
    linear = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    linear.weight = embedding.weight
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.detach().to(dtype))
    model.set_submodule(head_name, linear.train(head.training))
    _set_ties(model, {**_ties(model), f"{head_name}.weight": f"{_name_of(model, embedding)}.weight"})


def _embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    found = model.get_input_embeddings()
    # A subclass may do anything to its rows; Gemma's multiply by a constant, which is understood.
    scaled = isinstance(found, nn.Embedding) and hasattr(found, "scalar_embed_scale")
    if type(found) is not nn.Embedding and not scaled:
        raise UnsupportedModule(
            f"the input embedding of {type(model).__name__} is {type(found).__name__}; only nn.Embedding and Gemma's "
            "scaled one can be int8: leave --head as it is"
        )
    assert isinstance(found, nn.Embedding)
    return _name_of(model, found), found


def _head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear):
        what = "no head" if found is None else f"{type(found).__name__} as its head"
        raise UnsupportedModule(
            f"{type(model).__name__} has {what}; only an nn.Linear can be int8: leave --head as it is"
        )
    return _name_of(model, found), found


def _factor(embedding: nn.Embedding) -> float:
    return float(getattr(embedding, "scalar_embed_scale", 1.0))


def _is_tied(model: PreTrainedModel, head_name: str) -> bool:
    """Whether the head's weight is the embedding's: by the model's own word, and in memory."""
    weight = f"{head_name}.weight"
    source = model.all_tied_weights_keys.get(weight)
    if source is None:
        return False
    head, embedding = model.get_parameter(weight), model.get_parameter(source)
    return head is embedding or (not head.is_meta and head.data_ptr() == embedding.data_ptr())


def _name_of(model: PreTrainedModel, module: nn.Module | None) -> str:
    name: str = next(name for name, other in model.named_modules() if other is module)
    return name


def _ties(model: PreTrainedModel) -> dict[str, str]:
    ties: dict[str, str] = model.all_tied_weights_keys
    return ties


def _set_ties(model: PreTrainedModel, ties: dict[str, str]) -> None:
    model.all_tied_weights_keys = model._tied_weights_keys = ties
