"""The explorer's widgets: menus, the table of neurons, and the views of the one chosen."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import ipywidgets as w

from entangle.explorer.evidence import Content, Question, Render
from entangle.explorer.export import followed
from entangle.explorer.views import PAGE, LayerMenu, NeuronTable
from entangle.runs.tables import escaped


class Silence:
    """A switch: while it is on, changes of widgets are ours and no clicks."""

    def __init__(self) -> None:
        self._depth = 0

    def __bool__(self) -> bool:
        return self._depth > 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Switch on inside the ``with`` block."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1


class Pane:
    """Pictures, HTML below them, and a button for what is offered."""

    def __init__(self, render: Render) -> None:
        self.render = render
        self.pictures = [w.Image(format="png", layout=w.Layout(display="none")) for _ in range(2)]
        self.note, self.html = w.HTML(), w.HTML()
        self.button = w.Button(layout=w.Layout(display="none", width="auto"))
        self.box = w.VBox([self.note, *self.pictures, self.html, self.button]).add_class(
            "entangle-pane"
        )

    def show(self, content: Content) -> None:
        """Show what a view has rendered."""
        for widget, png in zip_longest(self.pictures, content.pictures):
            widget.layout.display = "none" if png is None else None
            if png is not None:
                widget.value = png
        self.note.value, self.html.value = content.note, content.html
        self.note.layout.display = None if content.note else "none"
        self.button.description = content.offer
        self.button.layout.display = None if content.offer else "none"

    def say(self, text: str) -> None:
        """Show a line of text in place of the button."""
        self.button.layout.display = "none"
        self.html.value = f"<p>{escaped(text)}</p>"


class QuestionPane(Pane):
    """A field for a text, a button below it, and the answer."""

    def __init__(self, question: Question, answered: Callable[[], None]) -> None:
        super().__init__(
            lambda layer, neuron, asked: question.answer(layer, neuron, self.entry.value, asked)
        )
        kind = w.Text if question.lines == 1 else w.Textarea
        self.entry = kind(
            placeholder=question.hint, continuous_update=question.lines > 1,
            layout=w.Layout(width="auto"),
        )  # fmt: skip
        if question.lines > 1:
            self.entry.rows = question.lines
        else:
            self.entry.observe(lambda change: answered() if change["new"] else None, "value")
        self.box.children = [self.entry, self.button, self.note, *self.pictures, self.html]


class NeuronList:
    """The table of neurons: titles that sort, a page of lines, and buttons that turn it.

    Parameters
    ----------
    chosen
        Called with a neuron when another one is chosen.
    """

    def __init__(self, chosen: Callable[[int], None]) -> None:
        self._chosen, self._silence = chosen, Silence()
        self.titles = w.HBox(layout=w.Layout(width="max-content")).add_class("entangle-titles")
        self.lines = w.Select(layout=w.Layout(width="max-content"))
        self.previous = w.Button(icon="angle-left", tooltip="previous page")
        self.next = w.Button(icon="angle-right", tooltip="next page")
        self.row, self.count, self.find = _number("row"), w.HTML(), _number("neuron")
        turn = w.HBox([self.previous, self.next, self.row, self.count, self.find])
        turn.add_class("entangle-turn")
        scroll = w.VBox([self.titles, self.lines], layout=w.Layout(overflow="auto hidden"))
        self.box = w.VBox([scroll, turn]).add_class("entangle-neurons")
        self.lines.observe(self._on_line, "index")
        self.row.observe(lambda change: self._step(change["new"] - 1), "value")
        self.find.observe(lambda change: self.choose(change["new"]), "value")
        self.previous.on_click(lambda _button: self._turn(-1))
        self.next.on_click(lambda _button: self._turn(+1))

    def show(self, table: NeuronTable, neuron: int | None = None) -> None:
        """Show a table, and choose a neuron of it, the first one by default."""
        self.table = table
        with self._silence.kept():
            self.titles.children = [self._title(number) for number in range(len(table.columns))]
            self.row.max = len(table.order)
            self.find.max = int(table.frame["neuron"].max())
        self.choose(table.neurons(0)[0] if neuron is None else neuron)

    def choose(self, neuron: int) -> None:
        """Choose a neuron: turn to its page, mark its line, tell who wants to know."""
        if self._silence:
            return
        page, row = self.table.place(neuron)
        with self._silence.kept():
            self._fill(page)
            self.lines.index = row
            self.row.value = page * PAGE + row + 1
            self.find.value = neuron
        self._chosen(neuron)

    def _title(self, number: int) -> w.Button:
        column = self.table.columns[number]
        arrow = "▲" if self.table.ascending else "▼"
        title = f"{column.title} {arrow}" if column.name == self.table.by else column.title
        button = w.Button(
            description=title,
            tooltip=f"sort by {column.name}",
            layout=w.Layout(width=f"{column.width}ch"),
        )
        button.on_click(lambda _button: self.sort(column.name))
        return button

    def sort(self, by: str) -> None:
        """Sort by a column, or the other way round if it is sorted by it, and show the first."""
        self.show(self.table.toggled(by))

    def _step(self, row: int) -> None:
        """Choose the neuron of a row, counted from 0 over all pages."""
        if not self._silence:
            self.choose(self.table.neurons(row // PAGE)[row % PAGE])

    def _turn(self, pages: int) -> None:
        self._step((self._page + pages) * PAGE)

    def _on_line(self, change: Mapping[str, Any]) -> None:
        row = change["new"]
        if row is not None:
            self._step(self._page * PAGE + row)

    def _fill(self, page: int) -> None:
        self._page, lines = page, self.table.lines(page)
        if list(self.lines.options) != lines:
            self.lines.options = lines
        first, total = page * PAGE + 1, len(self.table.order)
        self.count.value = f"of {total:,}, listed {first:,}–{first + len(lines) - 1:,}"
        self.previous.disabled, self.next.disabled = page == 0, page + 1 == self.table.n_pages


class Board:
    """The whole explorer as widgets.

    Parameters
    ----------
    menu
        The layers.
    table_of
        From a layer's full name to its table.
    heading
        From a layer, its table and a neuron to HTML.
    views
        What is shown of a neuron, by the title of its tab.
    export
        Called with a layer, a neuron, the title of the tab that is shown and ``html`` or ``png``;
        returns the HTML of a link. Without it nothing can be exported.
    """

    def __init__(
        self,
        menu: LayerMenu,
        *,
        table_of: Callable[[str], NeuronTable],
        heading: Callable[[str, NeuronTable, int], str],
        views: "Mapping[str, Render | Question]",
        export: Callable[[str, int, str, str], str] | None = None,
    ) -> None:
        self._menu, self._table_of, self._heading = menu, table_of, heading
        self._silence = Silence()
        self.panes = [
            QuestionPane(one, lambda: self._render(asked=True))
            if isinstance(one, Question)
            else Pane(one)
            for one in views.values()
        ]
        self.block = _menu("block", [*menu.blocks])
        self.projection = _menu("layer", [*menu.blocks[self.block.value]])
        self.name = w.HTML()
        self.tabs = w.Tab([pane.box for pane in self.panes], titles=[*views])
        self.neurons = NeuronList(self._show)
        style = files("entangle.explorer").joinpath("style.css").read_text("utf-8")
        menus = w.HBox([self.block, self.projection]).add_class("entangle-menus")
        left = w.VBox([menus, self.neurons.box]).add_class("entangle-left")
        self.link = w.HTML()
        self.exports = [
            _export_button(kind, partial(self._export, kind)) for kind in ("html", "png")
        ]
        tools = w.HBox([*self.exports, self.link]).add_class("entangle-tools")
        self._exporter = export
        if export is None:
            tools.layout.display = "none"
        right = w.VBox([self.name, tools, self.tabs]).add_class("entangle-right")
        both = w.HBox([left, right], layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([w.HTML(f"<style>{style}</style>"), both]).add_class("entangle-explorer")
        self.block.observe(lambda _change: self._block_chosen(), "value")
        self.projection.observe(lambda _change: self._layer_chosen(), "value")
        self.tabs.observe(lambda _change: self._render(), "selected_index")
        for pane in self.panes:
            pane.button.on_click(lambda _button: self._render(asked=True))

    def open(self, layer: str, neuron: int | None = None) -> None:
        """Show a layer by its full name, and a neuron of it, the first one by default."""
        block, label = self._menu.label(layer)
        with self._silence.kept():
            self.block.value = block
            self.projection.options = [*self._menu.blocks[block]]
            self.projection.value = label
        self.neurons.show(self._table_of(layer), neuron)

    @property
    def layer(self) -> str:
        """Full name of the layer that is shown."""
        return self._menu.blocks[self.block.value][self.projection.value]

    def _block_chosen(self) -> None:
        if self._silence:
            return
        labels, label = self._menu.blocks[self.block.value], self.projection.value
        self.open(labels.get(label, next(iter(labels.values()))))

    def _layer_chosen(self) -> None:
        if not self._silence:
            self.open(self.layer)

    def _show(self, neuron: int) -> None:
        self.neuron = neuron
        self.link.value = ""
        self.name.value = self._heading(self.layer, self.neurons.table, neuron)
        self._render()

    def _export(self, kind: str, _button: w.Button) -> None:
        assert self._exporter is not None  # noqa: S101
        tab = self.tabs.titles[self.tabs.selected_index or 0]
        found = self._exporter(self.layer, self.neuron, tab, kind)
        if found.startswith("<a "):
            self.link.value = followed(found)
        self.link.value = found  # what is kept saves nothing when it is shown again

    def _render(self, *, asked: bool = False) -> None:
        pane = self.panes[self.tabs.selected_index or 0]
        if asked:
            pane.say("Computing …")
        try:
            content = pane.render(self.layer, self.neuron, asked)
        except Exception as error:
            pane.say(f"This view failed: {type(error).__name__}.")
            raise
        pane.show(content)


def _number(name: str) -> w.BoundedIntText:
    return w.BoundedIntText(
        min=1 if name == "row" else 0, max=1, continuous_update=False, description=name,
        style={"description_width": "initial"}, layout=w.Layout(width="9.5em"),
    )  # fmt: skip


def _export_button(kind: str, clicked: Callable[[w.Button], None]) -> w.Button:
    said = {"html": "all that is known of this neuron, as a page", "png": "the figure of this tab"}
    button = w.Button(
        description=kind.upper(), icon="download", tooltip=f"export {said[kind]}",
        layout=w.Layout(width="auto"),
    )  # fmt: skip
    button.on_click(clicked)
    return button


def _menu(name: str, options: list[str]) -> w.Dropdown:
    return w.Dropdown(
        options=options, description=name, style={"description_width": "initial"},
        layout=w.Layout(width="max-content"),
    )  # fmt: skip
