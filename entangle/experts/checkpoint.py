"""Expanded models on disk: one safetensors file a block, packed, and a manifest for them all.

Blocks of a build appear as they are made, the final name when all is there (`BuildFolder`);
`load_expanded` reads them. Expanded models refuse ``save_pretrained``, which knows no routers.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entangle.errors import InvalidInput, Unavailable
from entangle.experts.build import ExpandedLayer, structural_copy
from entangle.experts.linear import ExpandedLinear, SharedRouting, pack, unpack
from entangle.experts.router import Router
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model, load_model
from entangle.results.expansion import KIND, read_run, write_run
from entangle.runs.provenance import expand_user, output_folder, read_manifest, write_json
from entangle.runs.reading import READ_ERRORS, inside
from entangle.runs.sealing import file_digest
from entangle.runs.unfinished import Unfinished, is_made

_METADATA = "entangle"
"""In the manifest."""


def block_file(index: int) -> str:
    """Return the name of the file of a block's experts."""
    return f"block-{index:04d}.safetensors"


def write_block(
    path: Path, expanded: Sequence[ExpandedLayer], report: Sequence[Mapping[str, object]]
) -> None:
    """Write the experts and routers of one block.

    Experts are stored as a bitmap (one bit a weight) and the non-zeros in the layer's dtype;
    routers as they are, once for all the layers that share one; the rows of the report beside them.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    routers = distinct_routers(expanded)
    for one in expanded:
        number = routers.index(one.module.routing)
        tensors[f"{one.layer.name}:bitmap"], tensors[f"{one.layer.name}:values"] = pack(
            one.module.weight.detach()
        )
        layers[one.layer.name] = {"router": number, "shape": list(one.module.weight.shape)}
    for number, routing in enumerate(routers):
        for name, value in routing.router.state().items():
            tensors[f"router {number}:{name}"] = value.cpu().contiguous()
    _save(tensors, path, json.dumps({"layers": layers, "report": list(report)}))


def distinct_routers(expanded: Sequence[ExpandedLayer]) -> list[SharedRouting]:
    """Return the routers of some layers, each once, in the order of the layers."""
    return list(dict.fromkeys(one.module.routing for one in expanded))


def _save(tensors: dict[str, Tensor], path: Path, described: str) -> None:
    """Write a safetensors file; what the disk says against it is an OSError, as everywhere."""
    with disk_refusals():
        save_file(tensors, path, {_METADATA: described})  # one key: their order is not fixed


@contextmanager
def disk_refusals() -> Iterator[None]:
    """Raise as an OSError what the disk says against a safetensors file."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_block(
    path: Path, layers: Mapping[str, Layer]
) -> tuple[list[ExpandedLayer], list[dict[str, object]]]:
    """Read a block's experts and report; bias, dtype and device are those of the dense ``layers``.

    Raises
    ------
    InvalidInput
        If the file is missing, truncated or altered, or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[_METADATA])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _rebuild(described["layers"], tensors, layers), described["report"]
    except READ_ERRORS as error:
        raise InvalidInput(
            f"{str(path)!r} is damaged or does not fit the model ({error}); build it anew."
        ) from error


def _rebuild(
    described: Mapping[str, Mapping[str, object]],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
) -> list[ExpandedLayer]:
    routings: dict[object, SharedRouting] = {}
    rebuilt = []
    for name, entry in described.items():
        layer, number, shape = layers[name], entry["router"], entry["shape"]
        if not isinstance(shape, list) or tuple(shape[1:]) != layer.shape:
            raise ValueError(f"layer {name!r} has shape {layer.shape}, the experts {shape}")
        if number not in routings:
            prefix = f"router {number}:"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            routings[number] = SharedRouting(Router.from_state(state).to(layer.device))
        weight = unpack((tensors[f"{name}:bitmap"], tensors[f"{name}:values"]), tuple(shape))
        module = ExpandedLinear(
            weight.to(layer.device, layer.weight.dtype), layer.bias, routings[number]
        )
        rebuilt.append(ExpandedLayer(layer, module, None))
    return rebuilt


def install(module: nn.Module, expanded: Sequence[ExpandedLayer]) -> None:
    """Put expanded layers into a model, in place of the dense ones."""
    for one in expanded:
        module.set_submodule(one.layer.name, one.module)


def refuse_saving(module: nn.Module) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` raise `InvalidInput`.

    They would write the experts as plain weights, without the routers, which nothing could load.

    Parameters
    ----------
    module
        An expanded model; nothing happens to one without these methods.
    """
    for name in ("save_pretrained", "push_to_hub"):
        if hasattr(module, name):
            object.__setattr__(module, name, _refuse)


def _refuse(*_arguments: object, **_settings: object) -> None:
    raise InvalidInput(
        "transformers cannot write the routers of a Sparse Expansion; write a checkpoint with "
        "entangle.expand(..., out=DIR) (entangle expand --out DIR) and load it with "
        "entangle.load_expanded(DIR)."
    )


_ENDING = "building"


class BuildFolder:
    """Where a build writes its blocks, under a hidden name beside the final one.

    Parameters
    ----------
    final
        Name of the finished checkpoint.
    manifest
        What is built; a build is resumed only by one of the same model, text and settings.
    resume
        Go on with an unfinished build, if there is one; a finished one of the same model, texts
        and settings is read, and stays as it is.
    force
        Replace a finished checkpoint, and an unfinished build unless it is resumed.

    Raises
    ------
    InvalidInput
        If the checkpoint exists, or an unfinished build that is not to be resumed or differs.
    """

    def __init__(
        self, final: Path, manifest: Mapping[str, object], *, resume: bool, force: bool
    ) -> None:
        kind = str(manifest["kind"])
        self._finished = resume and is_made(final, kind, manifest, ending=_ENDING)
        if self._finished:  # killed after the last block, for example while it was evaluated
            self.final = self.path = Path(os.path.realpath(expand_user(final)))
            made = read_manifest(final, kind)
            self._files = made.get("files")
            silent = made.get("layers_without_tokens")
            self._silent = set(silent) if isinstance(silent, list) else set()
            return
        self._force = force
        self._unfinished = Unfinished(
            final, manifest, what="build", ending=_ENDING, resume=resume, force=force
        )
        self.final, self.path = self._unfinished.final, self._unfinished.path

    def write(
        self, index: int, expanded: Sequence[ExpandedLayer], rows: Sequence[Mapping[str, object]]
    ) -> None:
        """Write one block, unless an earlier run has written it; the first makes the folder."""
        if self._finished:
            return
        self._unfinished.keep(
            block_file(index), partial(write_block, expanded=expanded, report=rows)
        )

    def read(
        self, index: int, layers: Sequence[Layer]
    ) -> tuple[list[ExpandedLayer], list[dict[str, object]]] | None:
        """Read a block that an earlier run has written, or None.

        Raises
        ------
        InvalidInput
            If its file was truncated or altered, or is missing from a finished build.
        """
        name = block_file(index)
        if self._finished and {layer.name for layer in layers} <= self._silent:
            return [], []
        path = self._made(name) if self._finished else self._unfinished.find(name)
        return None if path is None else read_block(path, {one.name: one for one in layers})

    def _made(self, name: str) -> Path:
        """Return the file of a block of a finished build."""
        path = inside(self.path, name, what=f"the finished build {str(self.path)!r}")
        known = self._files if isinstance(self._files, dict) else {}
        if not path.exists() or known.get(name) != file_digest(path):
            raise InvalidInput(
                f"{str(path)!r} is missing, truncated or altered; build it anew with --force "
                "(force=True) without --resume."
            )
        return path

    def finish(
        self,
        table: pd.DataFrame,
        manifest: Mapping[str, object],
        run: Mapping[str, object],
        *,
        extra: Callable[[Path], object] | None = None,
    ) -> Mapping[str, object]:
        """Write the table and the manifest with every file's digest, and take the final name.

        Seconds and memory of the run go to ``run.json``, so that all other files are the same for
        every build of the same settings. Returned are those of the build, which was another run
        where a finished one is read. Before the folder takes its name, ``extra`` is called with it.
        """
        if self._finished:
            return read_run(self.path) or run
        digests = dict(sorted(self._unfinished.digests().items()))
        with output_folder(self.final, force=self._force) as folder:
            for name in digests:
                _place(self.path / name, folder / name)
            table.to_parquet(folder / "layers.parquet", index=False)
            write_json(folder / "manifest.json", {**manifest, "files": digests})
            write_run(folder, run)
            if extra is not None:
                extra(folder)
        self._unfinished.remove()
        return run


def _place(piece: Path, file: Path) -> None:
    """Give a piece a second name; where the file system knows no links, copy it."""
    try:
        os.link(piece, file)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(piece, file)


_MODEL = {"name", "source", "revision", "digest", "dtype", "class"}


@evaluates
def load_expanded(
    path: str | os.PathLike[str],
    *,
    base: AnyModel | None = None,
    device: str | torch.device = "auto",
) -> LanguageModel:
    """Load an expanded model that `entangle.expand` wrote; it generates like any other.

    Parameters
    ----------
    path
        The checkpoint's folder.
    base
        The dense model: a name or path for `entangle.load_model`, a module or a `LanguageModel`;
        by default the name in the checkpoint's manifest.
    device
        Where a base that is named goes.

    Returns
    -------
    LanguageModel
        Experts are held with their zeros, in the base model's dtype: about ``experts`` times the
        memory of the layers that were expanded.

    Raises
    ------
    InvalidInput
        If the folder is no checkpoint, a file is truncated or altered, or the base model is another
        than the one that was expanded.
    Unavailable
        If the base model is not where the manifest says, and ``base`` is not given.
    """
    manifest = _manifest(path)
    if base is None or isinstance(base, str | os.PathLike):
        dense = load_base(path, None if base is None else os.fspath(base), device=device)
    else:
        dense = as_language_model(base)
    _check_digest(dense, manifest, path)
    module = structural_copy(dense.module)
    layers = {layer.name: layer for layer in list_layers(module)}
    missing = set(manifest["settings"]["sparsity"]) - set(manifest.get("layers_without_tokens", ()))
    for name, digest in manifest["files"].items():
        file = expand_user(path) / name
        _check_file(file, digest)
        found = read_block(file, layers)[0]
        install(module, found)
        missing -= {one.layer.name for one in found}
    if missing:
        raise InvalidInput(
            f"{str(path)!r} has no experts for {min(missing)!r}: its manifest.json or a file was "
            "altered; build it anew."
        )
    refuse_saving(module)
    return LanguageModel(module, dense.tokenizer, str(path), "expansion", dense.revision)


def load_base(
    path: str | os.PathLike[str],
    base: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
) -> LanguageModel:
    """Load the dense model that a checkpoint was made from, in the dtype it had.

    Parameters
    ----------
    path
        The checkpoint's folder.
    base, revision
        The dense model's name, and the revision of one from the hub; by default those in the
        checkpoint's manifest.
    device
        Where it goes.

    Raises
    ------
    InvalidInput, Unavailable
        If it cannot be loaded, or is another model than the one that was expanded.
    """
    manifest = _manifest(path)
    made_from = manifest["model"]
    if base is None:
        base, revision = str(made_from["name"]), made_from["revision"]
        if made_from["source"] in ("folder", "gguf"):
            places = (str(made_from.get("path")), str(expand_user(base)))
            there = [place for place in places if os.path.exists(place)]  # noqa: PTH110
            if not there:
                raise _no_base(path, made_from, "is no longer there")
            base = there[0]
        if made_from["source"] == "memory":
            raise _no_base(path, made_from, "was in memory only")
    try:
        dense = load_model(base, revision=revision, dtype=str(made_from["dtype"]), device=device)
    except (InvalidInput, Unavailable) as error:
        raise type(error)(f"the dense model of {str(path)!r}: {error}") from error
    _check_digest(dense, manifest, path)
    return dense


def _manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    manifest: dict[str, Any] = read_manifest(path, KIND)
    made_from, files = manifest.get("model"), manifest.get("files")
    settings = manifest.get("settings")
    complete = isinstance(made_from, dict) and made_from.keys() >= _MODEL
    complete &= isinstance(settings, dict) and isinstance(settings.get("sparsity"), dict)
    if not complete or not isinstance(files, dict):
        raise InvalidInput(f"{str(path)!r} has a damaged manifest.json; build it anew.")
    for name in files:
        inside(expand_user(path), name, what=f"the manifest.json of {str(path)!r}")
    return manifest


def _no_base(
    path: str | os.PathLike[str], made_from: Mapping[str, object], why: str
) -> Unavailable:
    return Unavailable(
        f"the dense model {made_from['name']!r} ({made_from['class']}, digest "
        f"{str(made_from['digest'])[:12]}…) of {str(path)!r} {why}; name it with --base (base)."
    )


def _check_digest(
    dense: LanguageModel, manifest: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    wanted = str(manifest["model"]["digest"])
    if dense.digest != wanted:
        raise InvalidInput(
            f"the base model {dense.name!r} has digest {dense.digest[:12]}…, but {str(path)!r} was "
            f"made from {wanted[:12]}…; pass the model it was made from as `base` (--base)."
        )


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise InvalidInput(f"{str(path)!r} is missing; the checkpoint is incomplete.")
    if file_digest(path) != digest:
        raise InvalidInput(f"{str(path)!r} was truncated or altered; build it anew.")
