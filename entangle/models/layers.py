"""Finding and addressing the linear layers of a model by its structure.

No list of model families: the transformer blocks are the longest ``ModuleList`` of like modules, a
layer is an ``nn.Linear``, a GPT-2 ``Conv1D``, whose transposed weight is handled here alone, or
what stands in for one: a quantised linear, an adapter (PEFT) around a linear, which is one layer
with it, or one projection of an expert whose weights are stacked with those of others
(`entangle.models.mixtures`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from entangle.checks import names, several, shown
from entangle.errors import InvalidInput, unknown_name
from entangle.models.mixtures import (
    EXPERT,
    ExpertLinear,
    expert_shares,
    expose,
    quantised_experts,
    stored_name,
)
from entangle.models.shards import place_of, present, stored_of

LISTING = "`entangle layers MODEL` lists them all."
_INNER = ("base_layer", "original_module")  # what PEFT's wrappers call the layer they stand for


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer of a model."""

    name: str
    """Full dotted name inside the model."""
    block: int | None
    """Index of the transformer block, None outside the blocks (for example ``lm_head``)."""
    projection: str
    """Last component of the name."""
    module: nn.Module
    """The module itself; its output is ``x @ weight.T + bias`` unless it is a kind of its own."""
    transposed: bool
    """Whether the module stores its weight as (in_features, out_features)."""
    aliases: tuple[str, ...] = ()
    """Other names of the same module, which then runs at several depths."""
    shared: tuple[str, ...] = ()
    """Names of other modules' parameters that are the same memory as this layer's weight."""
    share: float = 1.0
    """Share of a text's tokens that the layer sees: of an expert, where all are sent equally many;
    NaN where the model does not declare to how many experts a token is sent."""

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        """The module's weight, one row a neuron, detached.

        A view that writes through to the model where the layer is `writable`. A parametrised weight
        is the one in force; that of an adapter, or of a packed (quantised) module, is what the
        module makes of the unit vectors.
        """
        stored = self._stored
        if stored is None:
            return self._probed()[0]
        if stored.is_meta:  # never of an expert, whose weight is read
            stored = present(self.module.get_parameter("weight"))
        return stored.T if self.transposed else stored

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The module's bias, detached; None without one."""
        if self._stored is None:
            return self._probed()[1]
        bias = getattr(self.module, "bias", None)
        return present(bias).detach() if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """The pair (out_features, in_features)."""
        stored = self._stored
        if stored is None:
            inner = _inner(self.module)
            return _size(inner, "out_features"), _size(inner, "in_features")
        rows, columns = stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def out_features(self) -> int:
        """Number of neurons."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Number of inputs of a neuron."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        held = (*self.module.parameters(), *self.module.buffers())
        return place_of(held[0]) if held else torch.device("cpu")

    @property
    def offloaded(self) -> bool:
        """Whether the weight is brought from elsewhere only while the layer runs (accelerate).

        One that comes from shards block by block (`entangle.models.streaming`) can be read always.
        """
        return any(p.is_meta and stored_of(p) is None for p in self.module.parameters())

    @property
    def writable(self) -> bool:
        """Whether writing to `weight` changes this layer and nothing else.

        It does not where the weight is computed (a parametrisation, an adapter, a packed format)
        or is the memory of another module's parameter, such as a head tied to the embedding.
        """
        parameters: Any = self.module._parameters
        if isinstance(self.module, ExpertLinear):
            return True
        return parameters.get("weight") is not None and self._stored is not None and not self.shared

    @property
    def is_expert(self) -> bool:
        """Whether the layer is part of an expert, which sees the tokens that are sent to it."""
        return EXPERT.search(self.name) is not None

    def check_writable(self, what: str) -> None:
        """Raise `InvalidInput` unless the layer is `writable`; ``what`` needs it."""
        if self.writable:
            return
        reason = (
            f"its memory is also {self.shared[0]!r}" if self.shared
            else f"{type(self.module).__name__} computes it"
        )  # fmt: skip
        raise InvalidInput(
            f"{what} writes to the weight of layer {self.name!r}, but {reason}; give it a plain "
            "weight of its own first (merge the adapter, remove the parametrisation, untie it)."
        )

    @property
    def _stored(self) -> Tensor | None:
        """The weight as the module stores it or its parametrisation gives it; None if packed."""
        if _inner(self.module) is not self.module:
            return None
        with torch.no_grad():
            weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            return None
        return weight.detach()

    def _probed(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias of the affine map that the module is."""
        inner = _inner(self.module)
        dtypes = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        dtype = next(dtypes, torch.float32)
        size, device = _size(inner, "in_features"), self.device
        units = torch.eye(size, dtype=dtype, device=device)
        with torch.inference_mode(False), torch.no_grad():  # not through hooks, which count runs
            bias = self.module.forward(torch.zeros_like(units[:1]))[0]
            weight = (self.module.forward(units) - bias).T.contiguous()
        return weight, bias if bool(bias.count_nonzero()) else None


def _inner(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter wraps, or the module itself."""
    for name in _INNER:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module) and inner is not module:
            return _inner(inner)
    return module


def _size(module: nn.Module, name: str) -> int:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[name == "out_features"])
    return int(getattr(module, name))


@dataclass(frozen=True)
class FusedExperts:
    """Experts of a mixture in a layout that is not known: listed, but not addressable."""

    name: str
    """Full dotted name of the parameter."""
    block: int | None
    """Index of the transformer block, None outside the blocks."""
    shape: tuple[int, ...]
    """Shape of the parameter; experts come first."""
    why: str = "a layout that is not known"
    """Why they are not addressable."""


def list_layers(module: nn.Module) -> tuple[Layer, ...]:
    """Return every linear layer of ``module`` in module order; a shared module is listed once.

    An adapter and the linear it wraps are one layer, of the wrapper's name. Experts that are held
    in stacked parameters get stand-ins in the module's tree (`entangle.models.mixtures.expose`).

    Parameters
    ----------
    module
        A model, usually from transformers.
    """
    expose(module)
    blocks, owners, names = _block_name(module), _owners(module), _names(module)
    shares = expert_shares(module)
    found: list[Layer] = []
    inside: tuple[str, ...] = ()  # of an adapter
    for name, child in module.named_modules():
        if inside and name.startswith(inside):
            continue
        inner = _inner(child)
        if not _is_linear(inner):
            continue
        if inner is not child:
            inside = (*inside, f"{name}.")
        aliases = names[id(child)]
        found.append(
            Layer(
                name=name,
                block=_block_index(name, blocks),
                projection=name.rpartition(".")[2],
                module=child,
                transposed=isinstance(inner, Conv1D),
                aliases=tuple(other for other in aliases if other != name),
                shared=_shared(inner, owners, aliases),
                share=shares.get(name[: at.start()] if (at := EXPERT.search(name)) else "", 1.0),
            )
        )
    return tuple(found)


def _is_linear(module: nn.Module) -> bool:
    """Tell a linear layer from a part that only inherits from one, such as a router."""
    kind = type(module).__name__.lower()
    if isinstance(module, nn.Linear | Conv1D):
        plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        return plain or re.search("router|gat(e|ing)$", kind) is None
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return "linear" in kind and all(isinstance(n, int) for n in sizes)


def _names(module: nn.Module) -> dict[int, list[str]]:
    """Return all names of every module, by identity."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, child in module.named_modules(remove_duplicate=False):
        names[id(child)].append(name)
    return names


Owned = tuple[str, int, int]
"""A parameter's name, and the bytes of its storage that it reaches from and up to."""


def _memory(parameter: Tensor) -> tuple[object, int, int]:
    """Return the storage that a parameter lies in, and the bytes from and up to which it does."""
    if parameter.is_meta or not parameter.numel():
        return id(parameter), 0, 1
    try:
        storage = parameter.untyped_storage().data_ptr()
        first = parameter.storage_offset()
        last = first + sum(
            (n - 1) * abs(s) for n, s in zip(parameter.shape, parameter.stride(), strict=True)
        )
    except (RuntimeError, NotImplementedError):  # a tensor subclass without storage of its own
        return id(parameter), 0, 1
    size = parameter.element_size()
    return (parameter.device, storage), int(first * size), int((last + 1) * size)


def _owners(module: nn.Module) -> dict[object, list[Owned]]:
    """Return the parameters of every storage."""
    owners: dict[object, list[Owned]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        storage, first, last = _memory(parameter)
        owners[storage].append((name, first, last))
    return owners


def _shared(
    module: nn.Module, owners: dict[object, list[Owned]], names: Sequence[str]
) -> tuple[str, ...]:
    """Return the parameters of other modules that are a layer's weight."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return ()
    own = tuple(f"{name}." for name in names)
    storage, first, last = _memory(weight)
    return tuple(
        name
        for name, begin, end in owners[storage]
        if begin < last and first < end and not name.startswith(own)
    )


def list_fused_experts(module: nn.Module) -> tuple[FusedExperts, ...]:
    """Return the parameters inside the blocks that hold experts who cannot be addressed.

    Every 3-D one that is neither a convolution's kernel nor of a layout that
    `entangle.models.mixtures` knows, and those of quantised experts.
    """
    expose(module)
    blocks = _block_name(module)
    known = {id(layer.module.stack.stored) for layer in list_layers(module)
             if isinstance(layer.module, ExpertLinear)}  # fmt: skip
    found = []
    for name, child in module.named_modules():
        block = _block_index(name, blocks)
        if isinstance(child, _ConvNd | ExpertLinear) or block is None:
            continue
        quantised = quantised_experts(child)
        for key, parameter in child.named_parameters(recurse=False):
            if id(parameter) not in known and (parameter.ndim == 3 or key in quantised):
                why = quantised.get(key, FusedExperts.why)
                found.append(FusedExperts(f"{name}.{key}", block, tuple(parameter.shape), why))
    return tuple(found)


def find_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the transformer blocks of ``module`` and their dotted name.

    The blocks are the longest ``ModuleList`` whose members are alike (a common class below
    ``nn.Module``) and contain linears; lists nested inside a member of another list are parts of a
    block. Where a transformers model names its text decoder (``get_decoder``), only that part is
    searched, so that the vision tower of a multimodal model or the encoder of an encoder-decoder
    model is not taken instead; its layers keep block None. Of equally long lists the first wins.

    Raises
    ------
    InvalidInput
        When there is no such list.
    """
    name = _block_name(module)
    if name is None:
        raise InvalidInput(
            f"the model must hold its blocks in a ModuleList of like modules; "
            f"{type(module).__name__} has none: address its layers by full name."
        )
    blocks = module.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)  # noqa: S101
    return name, blocks


def refuse_experts(layers: Iterable[Layer], what: str) -> None:
    """Raise `InvalidInput`, naming it, for a part of an expert; ``what`` cannot deal with one."""
    for layer in layers:
        if isinstance(layer.module, ExpertLinear):
            raise InvalidInput(
                f"{what} cannot deal with experts of a mixture, which see some of the tokens, and "
                f"{layer.name!r} is part of one; choose other layers."
            )


LayerSpec = int | str | Layer | Iterable[int | str | Layer]
"""Which layers are meant; see `find_layers`."""

Projections = str | Iterable[str] | None
"""Which projections of them; see `find_layers`."""


class _Default(str):
    """A value that nobody asked for, which may be told from the same one that was asked for."""

    __slots__ = ()


DEFAULT_PROJ = _Default("mlp")
"""The feed-forward part of blocks; layers that are asked for by a name or a glob are all taken."""


def find_layers(module: nn.Module, spec: LayerSpec, proj: Projections = None) -> tuple[Layer, ...]:
    """Return the layers that ``spec`` and ``proj`` ask for, in module order, each once.

    Parameters
    ----------
    module
        A model, usually from transformers.
    spec
        A block index (``1`` or ``"1"``), a full dotted name, a `Layer` (by its name), a glob
        (``"*.mlp.gate_proj"``), ``"all"`` (every linear inside the blocks), or several of these.
        An expert is called as on disk (``"model.layers.3.mlp.experts.17.gate_proj"``); names and
        globs of checkpoints that transformers renames (``block_sparse_moe.experts.17.w1``) count.
    proj
        Narrows the choice: the last component or a dotted suffix of the name (``"gate_proj"``,
        ``"mlp.gate_proj"``), or several of them. ``"attn"`` or ``"attention"`` is the attention
        part of a block: its linears in a module named or classed "attn" or "attention", or so named
        themselves. ``"mlp"`` is the feed-forward part: its other linears, save those beside a
        convolution, which mixes tokens too. ``"experts"`` are the linears of a mixture's experts.
        None takes all. `DEFAULT_PROJ`, the default of commands
        and functions, is ``"mlp"`` of blocks and of ``"all"``, and narrows no names and globs.

    Raises
    ------
    UnknownName
        When a name, glob or projection matches nothing.
    InvalidInput
        When a block index is out of range, ``spec`` is empty, or fused experts are asked for.
    """
    layers, specs = list_layers(module), layer_specs(spec)
    if proj is DEFAULT_PROJ:
        blocks = [one for one in specs if one == "all" or str(one).lstrip("-").isdigit()]
        kept = set(_chosen(module, layers, [one for one in specs if one not in blocks], None))
        kept |= set(_chosen(module, layers, blocks, [str(proj)]))
    else:
        kept = set(_chosen(module, layers, specs, projections(proj)))
    return tuple(layer for layer in layers if layer.name in kept)


def _chosen(
    module: nn.Module,
    layers: Sequence[Layer],
    specs: Sequence[int | str],
    wanted: Sequence[str] | None,
) -> Iterator[str]:
    """Yield the names that some specs and projections ask for."""
    chosen = {name for one in specs for name in _resolve(module, layers, one)}
    found = tuple(layer for layer in layers if layer.name in chosen)
    if wanted is None:
        yield from chosen
    for one in wanted or () if found else ():
        yield from (layer.name for layer in _narrow(module, found, one))


def layer_specs(spec: LayerSpec) -> list[int | str]:
    """Return what `find_layers` takes as a list of block indices and names, at least one.

    Raises
    ------
    InvalidInput
        If it holds anything else.
    """
    found = [one.name if isinstance(one, Layer) else one for one in several("layers", spec, Layer)]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int | str):
            raise InvalidInput(f"`layers` must be block indices or names; got {shown(one)}.")
    return found


def projections(proj: Projections) -> list[str] | None:
    """Return the projections that `find_layers` takes as a list; None for all.

    Raises
    ------
    InvalidInput
        If it holds anything but names.
    """
    return None if proj is None else names("proj", proj)


def asked_by_name(layers: LayerSpec, chosen: Sequence[Layer]) -> bool:
    """Tell whether one of the ``chosen`` layers was asked for by a full name of its, or itself.

    A generator is read by this, as by `find_layers`: give both what `layer_specs` returns.
    """
    asked = set(layer_specs(layers))
    return any(asked & {layer.name, *layer.aliases} for layer in chosen)


def _block_name(module: nn.Module) -> str | None:
    root = _text_decoder(module)
    prefix = next(name for name, child in module.named_modules() if child is root)
    lists: list[tuple[str, int]] = []
    for name, child in root.named_modules(prefix=prefix):
        nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(child, nn.ModuleList) and not nested and _alike(child):
            lists.append((name, len(child)))
    return max(lists, key=lambda item: item[1])[0] if lists else None


def _text_decoder(module: nn.Module) -> nn.Module:
    get_decoder = getattr(module, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    inside = any(child is decoder for child in module.modules())
    if not isinstance(decoder, nn.Module) or not inside:
        return module
    return decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else module


def _alike(blocks: nn.ModuleList) -> bool:
    if not all(any(isinstance(m, nn.Linear | Conv1D) for m in b.modules()) for b in blocks):
        return False
    ancestries = [set(type(block).__mro__) - set(nn.Module.__mro__) for block in blocks]
    return bool(ancestries) and bool(set.intersection(*ancestries))


def _block_index(name: str, blocks: str | None) -> int | None:
    if blocks is None or not name.startswith(f"{blocks}."):
        return None
    return int(name[len(blocks) + 1 :].split(".")[0])


def _resolve(module: nn.Module, layers: Sequence[Layer], spec: int | str) -> list[str]:
    """Return the names of the layers that ``spec`` asks for, at least one."""
    if isinstance(spec, int) or re.fullmatch(r"-?[0-9]+", spec):
        index = _check_index(module, int(spec))
        names = [layer.name for layer in layers if layer.block == index]
    elif spec == "all":
        names = [layer.name for layer in layers if layer.block is not None]
    elif _is_glob(spec) and all(layer.name != spec for layer in layers):
        names = [layer.name for layer in layers if fnmatchcase(layer.name, spec)]
    else:
        names = list(_aliases(module, layers, spec))
    if names:
        return names
    if isinstance(spec, str) and (other := stored_name(module, spec)) != spec:
        return _resolve(module, layers, other)
    _refuse_experts(module, spec)
    raise unknown_name("layer", str(spec), (layer.name for layer in layers), LISTING)


def _is_glob(spec: str) -> bool:
    return re.search(r"[*?\[]", spec) is not None


def _refuse_experts(module: nn.Module, pattern: str | int) -> None:
    """Raise where ``pattern`` is the name, suffix, parent or glob of fused experts."""
    for experts in list_fused_experts(module):
        names = (experts.name, experts.name.rpartition(".")[0])
        inside = str(pattern).startswith(f"{names[1]}.")
        if inside or any(fnmatchcase(f".{name}", f"*.{pattern}") for name in names):
            raise InvalidInput(
                f"layer {experts.name!r} holds the weights of {experts.shape[0]} experts in "
                f"{experts.why}, so they cannot be addressed; choose plain linears. {LISTING}"
            )


def _check_index(module: nn.Module, index: int) -> int:
    count = len(find_blocks(module)[1])
    if not 0 <= index < count:
        raise InvalidInput(f"a block index must be in 0..{count - 1} for this model; got {index}.")
    return index


def _aliases(module: nn.Module, layers: Sequence[Layer], name: str) -> Iterator[str]:
    """Yield the listed name of the layer called ``name``, which a shared module may have twice."""
    for alias, child in module.named_modules(remove_duplicate=False):
        if alias == name:
            yield from (layer.name for layer in layers if layer.module is child)


def _narrow(module: nn.Module, layers: tuple[Layer, ...], proj: str) -> tuple[Layer, ...]:
    """Return the layers of one projection, at least one."""
    blocks = _block_name(module)
    if proj == "mlp":
        found = tuple(layer for layer in layers if _feed_forward(module, blocks, layer))
    elif proj in ("attn", "attention"):
        found = tuple(layer for layer in layers if _attends(module, blocks, layer))
    elif proj == "experts":
        found = tuple(layer for layer in layers if layer.is_expert)
    else:
        found = tuple(layer for layer in layers if f".{layer.name}".endswith(f".{proj}"))
    if found:
        return found
    other = stored_name(module, f"experts.*.{proj}").rpartition(".")[2]
    if other != proj and other != "*":
        return _narrow(module, layers, other)
    _refuse_experts(module, "experts" if proj == "mlp" else proj)
    raise unknown_name("projection", proj, (layer.projection for layer in layers), LISTING)


def _feed_forward(module: nn.Module, blocks: str | None, layer: Layer) -> bool:
    """Tell whether ``layer`` lies in a block, and no part on the way to it mixes tokens."""
    if layer.block is None or _attends(module, blocks, layer):
        return False
    holders = (part for _, part in _way(module, blocks, layer))
    return not any(isinstance(child, nn.Conv1d) for part in holders for child in part.children())


def _attends(module: nn.Module, blocks: str | None, layer: Layer) -> bool:
    """Tell whether ``layer`` lies in a block, in a part that its name or class calls attention.

    A class that is called a layer of a decoder (Zamba's) holds a feed-forward part too.
    """
    if layer.block is None:
        return False
    kinds = ((key, type(part).__name__) for key, part in _way(module, blocks, layer))
    parts = (key if kind.endswith("DecoderLayer") else f"{key} {kind}" for key, kind in kinds)
    return any(re.search("attn|attention", one, re.I) for one in (*parts, layer.projection))


def _way(module: nn.Module, blocks: str | None, layer: Layer) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every part between the block of ``layer`` and itself."""
    block, *parts = layer.name.removeprefix(f"{blocks}.").split(".")
    part: nn.Module = module.get_submodule(f"{blocks}.{block}")
    for key in parts[:-1]:
        part = part.get_submodule(key)
        yield key, part
