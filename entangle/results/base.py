"""What every result is: frames and a manifest, saved, loaded, and shown in one way."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import pandas as pd

from entangle.checks import choices, path_of
from entangle.errors import InvalidInput
from entangle.runs.provenance import (
    expand_user,
    output_folder,
    read_manifest,
    read_table,
    write_json,
)
from entangle.runs.sealing import Schema, broken
from entangle.runs.tables import described, html_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Loaded = TypeVar("Loaded", bound="Result")


@runtime_checkable
class Named(Protocol):
    """A layer of a model, as far as results know one."""

    @property
    def name(self) -> str:
        """Full dotted name."""


class Result(ABC):
    """Frames and a manifest; a class says which tables it has, and what its title and facts are.

    Subclasses are frozen dataclasses with a field for every table and one for the manifest.
    """

    KIND: ClassVar[str]
    """What a manifest calls such a result."""
    _TITLE: ClassVar[str]
    """Stands before the model's name where a result is shown."""
    _TABLES: ClassVar[Mapping[str, Schema]] = {}
    """What each Parquet table of the folder may hold, by its name; that of the result's own kind is
    the field ``frame``, all others are fields of their names."""
    _FILES: ClassVar[Sequence[str]] = ()
    """Other files that must be there."""
    _SHOWN: ClassVar[int] = 10
    """Rows that a notebook shows."""

    if TYPE_CHECKING:

        @property
        def frame(self) -> pd.DataFrame:
            """The tidy table that the result is about."""

        @property
        def manifest(self) -> Mapping[str, object]:
            """What was measured, on what, and how: JSON's types."""

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        extra: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write the result to a folder, under a temporary name until it is complete.

        Parameters
        ----------
        path
            The folder.
        force
            Replace an existing result.
        extra
            Called with the folder before it takes its name, to add files.

        Raises
        ------
        InvalidInput, Unavailable
            If the folder exists without ``force``, or cannot be written.
        """
        with output_folder(path, force=force) as folder:
            self.write(folder)
            if extra is not None:
                extra(folder)
        return Path(path)

    def write(self, folder: Path) -> None:
        """Write the files of `save` into a folder that exists."""
        for name in self._TABLES:
            table = getattr(self, self._field(name))
            table.to_parquet(folder / f"{name}.parquet", index=False)
        write_json(folder / "manifest.json", self.manifest)

    @classmethod
    def load(cls: type[Loaded], path: str | os.PathLike[str]) -> Loaded:
        """Load a result that `save` wrote, also one of an earlier version.

        Raises
        ------
        InvalidInput
            If the folder is missing, of another kind or schema, incomplete or corrupt.
        """
        files = [f"{name}.parquet" for name in cls._TABLES]
        manifest, folder = read_manifest(path, cls.KIND, [*files, *cls._FILES]), expand_user(path)
        fields: dict[str, Any] = {
            cls._field(name): read_table(folder / f"{name}.parquet", schema)
            for name, schema in cls._TABLES.items()
        }
        make: Callable[..., Loaded] = cls
        found = make(**cls._completed(folder, fields, manifest), manifest=manifest)
        fault = found._fault()
        if fault is not None:
            raise broken(folder, fault)
        return found

    @abstractmethod
    def plot(self, **options: Any) -> "Figure":
        """Draw the result's main figure in the style of a paper.

        Parameters
        ----------
        options
            Of the figure, such as ``column``; as its function in `entangle.plotting` takes them.
        """

    def figures(
        self,
        folder: str | os.PathLike[str],
        *,
        only: str | Iterable[str] | None = None,
        formats: str | Iterable[str] = ("pdf", "png"),
        force: bool = False,
        **options: Any,
    ) -> "dict[str, Path | InvalidInput]":
        """Draw and save every figure that the result holds, as `entangle figures` does.

        Parameters
        ----------
        folder
            Where to; made if it is missing.
        only
            Names of the figures, such as ``"wd_by_layer"``; None takes all of this kind of result.
        formats, force
            As in `entangle.plotting.save_figure`.
        options
            As `entangle.plotting.FigureOptions` says, for all of them. A name must be known to one
            of the figures.

        Returns
        -------
        dict
            By the figure's name the path of its files without their endings; or what keeps it from
            being drawn, such as a table that was not asked for.

        Raises
        ------
        InvalidInput, UnknownName
            No such figure or option, a file that exists.
        """
        from entangle.plotting import save_figure
        from entangle.results.drawings import attempts, drawings

        drawn, place = dict(drawings(self, options)), path_of("folder", folder)
        wanted = drawn if only is None else choices("only", only, drawn, kind="figure")
        found: dict[str, Path | InvalidInput] = {}
        for name, figure in attempts([(name, drawn[name]) for name in wanted], options):
            if isinstance(figure, InvalidInput):
                found[name] = figure
                continue
            save_figure(figure, place / name, formats=formats, force=force)
            found[name] = place / name
        return found

    def cite(self) -> str:
        """Return how to make the result again, in two sentences of plain text.

        The model with its digest, dtype and device, the texts with digests and numbers of tokens,
        the versions; the seeds, the manifest's digest and, where it is known, the command. What the
        manifest does not say is called not recorded.
        """
        from entangle.results.statement import statement

        return statement(self._TITLE, self.manifest)

    def summary(self) -> pd.DataFrame:
        """Return the table that sums the result up, in which a notebook shows it."""
        return self._told()[1]

    def to_latex(
        self, table: pd.DataFrame | None = None, *, caption: str = "", label: str = ""
    ) -> str:
        """Return a table of the result as LaTeX, for the package ``booktabs``.

        Parameters
        ----------
        table
            What is written: any table of the result, such as a part of ``frame``. By default the
            one that sums it up (`summary`).
        caption, label
            Of the table: a plain text and a name; neither is written where it is empty.
        """
        from entangle.runs.tables import latex_table

        return latex_table(self._summed() if table is None else table, caption, label)

    def _summed(self) -> pd.DataFrame:
        return self._told()[1]

    def _repr_html_(self) -> str:
        lines, table = self._told()
        title = f"{self._TITLE} {described(self.manifest, 'model', 'name')}"
        return html_result(title, lines, table, rows=self._SHOWN)

    def overview(self) -> tuple[list[str], pd.DataFrame]:
        """Return what a notebook shows: lines that sum the result up, and its main table."""
        return self._told()

    @abstractmethod
    def _told(self) -> tuple[list[str], pd.DataFrame]:
        """Return lines that sum the result up, and the table to show."""

    @classmethod
    def _completed(
        cls,
        folder: Path,  # noqa: ARG003
        fields: dict[str, Any],
        manifest: Mapping[str, object],  # noqa: ARG003
    ) -> dict[str, Any]:
        """Read what is no table, and add what tables of earlier versions lack."""
        return fields

    def _fault(self) -> str | None:
        """Return what does not fit together, None if nothing."""
        return None

    @classmethod
    def _field(cls, table: str) -> str:
        return "frame" if table == cls.KIND else table


def settings_of(manifest: Mapping[str, object]) -> Mapping[str, object]:
    """Return the settings of a manifest, empty where it has none."""
    found = manifest.get("settings")
    return found if isinstance(found, Mapping) else {}


def strange_layer(names: Sequence[str], manifest: Mapping[str, object]) -> str | None:
    """Say which layer is not among those of a manifest's settings, if it lists any."""
    known = settings_of(manifest).get("layers")
    strange = [one for one in names if one not in known] if isinstance(known, list) else []
    return f"layer {min(strange)!r} is not among the manifest's" if strange else None
