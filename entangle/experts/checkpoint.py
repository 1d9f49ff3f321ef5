"""Expanded models on disk: one safetensors file a block, packed, and a manifest for them all.

Blocks of a build appear as they are made, the final name when all is there (`BuildFolder`);
`load_expanded` reads them. Expanded models refuse ``save_pretrained``, which knows no routers.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from entangle.errors import InvalidInput, Unavailable
from entangle.experts import folder
from entangle.experts.block_files import (
    block_file,
    build_file,
    described_in,
    read_block,
    read_old_block,
    tensors_of,
    write_block,
    write_build,
)
from entangle.experts.build import ExpandedLayer, structural_copy
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model, load_model
from entangle.models.mixtures import put_layer, settle
from entangle.models.pretrained import load_folder
from entangle.packed import huggingface
from entangle.precision import resolve_device
from entangle.ranks import current
from entangle.results.expansion import KIND, read_run, write_run
from entangle.runs.provenance import (
    disk_errors,
    expand_user,
    output_folder,
    read_manifest,
    write_json,
)
from entangle.runs.reading import inside
from entangle.runs.sealing import file_digest
from entangle.runs.unfinished import PLAN, Unfinished, is_made

_CONFIG = "config.json"


def install(module: nn.Module, expanded: Sequence[ExpandedLayer]) -> None:
    """Put expanded layers into a model, in place of the dense ones."""
    for one in expanded:
        put_layer(module, one.layer.name, one.module)


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
            build_file(index), partial(write_build, expanded=expanded, report=rows)
        )
        self._unfinished.keep(block_file(index), partial(write_block, expanded=expanded))

    def adopt(self, index: int) -> None:
        """Keep the files of a block that another rank has written beside (`BlockWriters`)."""
        for name in (build_file(index), block_file(index)):
            self._unfinished.keep(name, partial(os.replace, _beside(self.path, name)))

    def read(
        self, index: int, layers: Sequence[Layer]
    ) -> tuple[list[ExpandedLayer], list[dict[str, object]]] | None:
        """Read a block that an earlier run has written, or None.

        Raises
        ------
        InvalidInput
            If its file was truncated or altered, or is missing from a finished build.
        """
        if self._finished and {layer.name for layer in layers} <= self._silent:
            return [], []
        find = self._made if self._finished else self._unfinished.find
        path, build = find(block_file(index)), find(build_file(index))
        if path is None or build is None:
            return None
        return read_block(path, build, {one.name: one for one in layers})

    def _made(self, name: str) -> Path | None:
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
        dense: LanguageModel,
        extra: Callable[[Path], object] | None = None,
    ) -> Mapping[str, object]:
        """Write the table and the manifest with every file's digest, and take the final name.

        Seconds and memory of the run go to ``run.json``, so that all other files are the same for
        every build of the same settings. Returned are those of the build, which was another run
        where a finished one is read. Before the folder takes its name, ``extra`` is called with it.
        The rest of the ``dense`` model goes into the folder too, unless transformers cannot build
        it.
        """
        if self._finished:
            return read_run(self.path) or run
        digests = dict(sorted(self._unfinished.digests().items()))
        with output_folder(self.final, force=self._force) as made:
            for name in digests:
                _place(self.path / name, made / name)
            table.to_parquet(made / "layers.parquet", index=False)
            write_run(made, run)
            if extra is not None:
                extra(made)
            complete(made, dense, manifest, list(digests), known=digests)
        self._unfinished.remove()
        return run


def _beside(folder: Path, name: str) -> Path:
    """Return where a rank writes a file that the first is to keep."""
    return folder / f"{name}.ranked"


class BlockWriters:
    """Which rank writes the files of a block: all in turn, where they see the first one's folder.

    The first rank writes the first block that is built, and says where. A block that another has
    written beside the kept ones is kept when the next one is told of, so that nobody waits.

    Parameters
    ----------
    folder
        Of the first rank, None on the others, and where nothing is written.
    """

    def __init__(self, folder: BuildFolder | None) -> None:
        self._folder, self._place, self._asked = folder, Path(), False
        self._waiting: list[int] = []
        self._taken_in_turn = False

    def of(self, index: int) -> int:
        """Return the rank that packs, reports and writes a block."""
        return index % current().size if self._taken_in_turn else 0

    def write(
        self, index: int, made: Sequence[ExpandedLayer], rows: Sequence[Mapping[str, object]]
    ) -> None:
        """Write a block that was built; called on all ranks, after one exchange about it."""
        by, ranks = self.of(index), current()
        self._keep()
        if by == 0 and self._folder is not None:
            self._folder.write(index, made, rows)
        elif by and by == ranks.rank:
            for name, write in (
                (build_file(index), partial(write_build, expanded=made, report=rows)),
                (block_file(index), partial(write_block, expanded=made)),
            ):
                with disk_errors(self._place / name):
                    write(_beside(self._place, name))
        if by:
            self._waiting.append(index)
        if ranks.size > 1 and not self._asked:
            self._meet()

    def finish(self) -> None:
        """Keep what was written last; called on all ranks."""
        if current().size > 1:
            current().exchange("written")
        self._keep()

    def _keep(self) -> None:
        folder = self._folder
        for index in self._waiting if folder is not None else ():
            assert folder is not None  # noqa: S101
            folder.adopt(index)
        self._waiting.clear()

    def _meet(self) -> None:
        """Find out whether all ranks see the folder in which the first has begun."""
        self._asked, ranks = True, current()
        place = ranks.exchange("" if self._folder is None else str(self._folder.path))[0]
        self._place = Path(place)
        seen = bool(place) and os.access(self._place, os.W_OK) and (self._place / PLAN).is_file()
        self._taken_in_turn = all(ranks.exchange(seen))


def complete(
    made: Path,
    dense: LanguageModel,
    manifest: Mapping[str, object],
    names: Sequence[str],
    *,
    known: Mapping[str, str] | None = None,
) -> None:
    """Write the dense rest and the model card beside the blocks, and the manifest.

    Parameters
    ----------
    made
        The folder.
    dense
        The dense model; there is no rest of one that transformers cannot build, or that a mixture's
        experts were expanded in.
    manifest
        Of the checkpoint.
    names
        Files of the blocks.
    known
        Their SHA-256, where it is known.
    """
    files = dict(folder.digests(made, names) if known is None else known)
    blocks = [described_in(made / name) for name in names if name.endswith(".build")]
    if folder.loads_alone(dense.module, blocks):
        shards = folder.write_dense(made, dense, folder.config_of(blocks, dense.module))
        files |= folder.digests(made, shards)
        folder.write_card(made, dense, manifest)
    write_json(made / "manifest.json", {**manifest, "files": files})


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
        Experts are held packed, mapped from their files. Those of a checkpoint of version 1 are
        held with their zeros: about ``experts`` times the memory of the layers that were expanded.

    Raises
    ------
    InvalidInput
        If the folder is no checkpoint, a file is truncated or altered, or the base model is another
        than the one that was expanded.
    Unavailable
        If the base model is not where the manifest says, and ``base`` is not given.
    """
    manifest = _manifest(path)
    where = expand_user(path)
    for name, digest in manifest["files"].items():
        _check_file(where / name, digest)
    _check_layers(where, manifest)
    if base is None and (where / _CONFIG).is_file():
        return _alone(path, manifest, device)
    dense = _dense(path, manifest, base, device)
    module = structural_copy(dense.module)
    (_put_packed if is_packed(manifest) else _put_old)(module, where, manifest)
    return LanguageModel(module, dense.tokenizer, str(path), "expansion", dense.revision)


def dense_of(
    path: str | os.PathLike[str], base: AnyModel | None, *, device: str | torch.device = "auto"
) -> tuple[dict[str, Any], LanguageModel]:
    """Return a checkpoint's manifest, all files checked, and its dense model; as `load_expanded`.

    Raises
    ------
    InvalidInput, Unavailable
        As `load_expanded`.
    """
    manifest = _manifest(path)
    for name, digest in manifest["files"].items():
        _check_file(expand_user(path) / name, digest)
    return manifest, _dense(path, manifest, base, device)


def _dense(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    base: AnyModel | None,
    device: str | torch.device,
) -> LanguageModel:
    if base is None or isinstance(base, str | os.PathLike):
        return load_base(path, None if base is None else os.fspath(base), device=device)
    dense = as_language_model(base)
    _check_digest(dense, manifest, path)
    return dense


def _alone(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], device: str | torch.device
) -> LanguageModel:
    target = resolve_device(device)
    module, tokenizer = load_folder(expand_user(path), dtype=None, device_map=None)
    placed: Any = module
    placed.to(target)
    revision = manifest["model"]["revision"]
    return LanguageModel(module, tokenizer, str(path), "expansion", revision)


def is_packed(manifest: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint has packed experts; version 1 knew no formats."""
    return "format" in manifest["settings"]


def _check_layers(where: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` unless every layer that was expanded has its experts."""
    missing = set(manifest["settings"]["sparsity"]) - set(manifest.get("layers_without_tokens", ()))
    ending = ".build" if is_packed(manifest) else ".safetensors"
    for name in manifest["files"]:
        if name.startswith("block-") and name.endswith(ending):
            missing -= described_in(where / name)["layers"].keys()
    if missing:
        raise InvalidInput(
            f"{str(where)!r} has no experts for {min(missing)!r}: its manifest.json or a file was "
            "altered; build it anew."
        )


def _put_packed(module: nn.Module, where: Path, manifest: Mapping[str, Any]) -> None:
    """Put packed experts, mapped from their files, in the place of a model's dense layers."""
    names = sorted(name for name in manifest["files"] if name.startswith("block-"))
    blocks = [described_in(where / name) for name in names if name.endswith(".build")]
    config = folder.config_of(blocks, module)
    weights = [where / name for name in names if name.endswith(".safetensors")]
    huggingface.check_files(weights, config)
    layers = {layer.name: layer for layer in list_layers(module)}
    dense = {name: layers[name] for name in config.layers}
    huggingface.install(module, config)
    tensors: dict[str, Tensor] = {}
    for path in weights:
        tensors |= tensors_of(path)
    for name, layer in dense.items():
        tensors |= {} if layer.bias is None else {f"{name}.bias": layer.bias}
    for name in (*config.layers, *config.routers):
        own = {
            key.removeprefix(f"{name}."): one.to(next(iter(dense.values())).device)
            for key, one in tensors.items()
            if key.rpartition(".")[0] == name
        }
        module.get_submodule(name).load_state_dict(own, assign=True)
    settle(module)


def _put_old(module: nn.Module, where: Path, manifest: Mapping[str, Any]) -> None:
    """Put the experts of a checkpoint of version 1, unpacked, in the place of dense layers."""
    layers = {layer.name: layer for layer in list_layers(module)}
    for name in manifest["files"]:
        install(module, read_old_block(where / name, layers))
    refuse_saving(module)


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


def base_at_hand(path: str | os.PathLike[str]) -> bool:
    """Tell whether the dense model that a checkpoint names can be loaded without a download."""
    made_from = _manifest(path)["model"]
    name, source = str(made_from["name"]), made_from["source"]
    if source == "hub":
        found = try_to_load_from_cache(name, _CONFIG, revision=made_from["revision"])
        return isinstance(found, str)
    if source in ("folder", "gguf", "adapter"):
        places = (str(made_from.get("path")), str(expand_user(name)))
        return any(os.path.exists(place) for place in places)  # noqa: PTH110
    return bool(source == "demo")


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
