"""Expanded layers on disk: one safetensors file a block, packed, and a manifest for them all.

What an expanded model says to ``save_pretrained``, which knows no routers.

The folder of a build: blocks appear as they are made, the final name when all is there.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.experts.build import ExpandedLayer
from entangle.experts.linear import ExpandedLinear, SharedRouting, pack, unpack
from entangle.experts.router import Router
from entangle.models.layers import Layer
from entangle.runs.provenance import expand_user, output_folder, read_manifest, write_json
from entangle.runs.reading import READ_ERRORS, inside
from entangle.runs.sealing import file_digest, manifest_digest
from entangle.runs.unfinished import Unfinished, is_made

_METADATA = "entangle"


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
    try:
        save_file(tensors, path, {_METADATA: described})  # one key: their order is not fixed
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


_RUN, _DIGEST, _ENDING = "run.json", "sha256", "building"


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
            return self._recorded() or run
        digests = dict(sorted(self._unfinished.digests().items()))
        with output_folder(self.final, force=self._force) as folder:
            for name in digests:
                _place(self.path / name, folder / name)
            table.to_parquet(folder / "layers.parquet", index=False)
            write_json(folder / "manifest.json", {**manifest, "files": digests})
            write_json(folder / _RUN, {**run, _DIGEST: manifest_digest(run)})
            if extra is not None:
                extra(folder)
        self._unfinished.remove()
        return run

    def _recorded(self) -> Mapping[str, object]:
        """Return what ``run.json`` of a finished build says; nothing where it was removed."""
        try:
            found = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict) or not found.keys() >= {"seconds", "peak_memory_bytes"}:
            return {}
        digest = found.pop(_DIGEST, None)
        return found if digest in (None, manifest_digest(found)) else {}


def _place(piece: Path, file: Path) -> None:
    """Give a piece a second name; where the file system knows no links, copy it."""
    try:
        os.link(piece, file)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(piece, file)
