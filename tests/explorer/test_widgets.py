"""The widgets without a front end: a click is a change of a widget's value in Python."""

from typing import TYPE_CHECKING, Any

import pytest

from entangle.explorer.evidence import Content, Render
from entangle.explorer.views import PAGE, LayerMenu, NeuronTable
from entangle.explorer.widgets import Board, NeuronList, Pane

if TYPE_CHECKING:
    import pandas as pd


def many(layer: str, count: int) -> "pd.DataFrame":
    import pandas as pd

    wd = [((7 * i) % count) / count for i in range(count)]
    return pd.DataFrame({"layer": layer, "neuron": range(count), "wd": wd, "md": range(count)})


class Watched:
    """A board over three layers, and what its views were asked to render."""

    def __init__(self) -> None:
        import pandas as pd

        self.rendered: list[tuple[str, str, int, bool]] = []
        self.frames = {
            "b.0.up": many("b.0.up", 250),
            "b.0.down": many("b.0.down", 3),
            "b.1.up": many("b.1.up", 1),
        }
        layers = pd.DataFrame({"layer": list(self.frames), "block": [0, 0, 1]})
        self.board = Board(
            LayerMenu.of(layers),
            table_of=lambda layer: NeuronTable.of(self.frames[layer]),
            heading=lambda layer, table, neuron: f"{layer} {neuron} of {len(table.frame)}",
            views={"First": self.view("First"), "Second": self.view("Second")},
        )
        self.board.open("b.0.up")

    def view(self, name: str) -> Render:
        def render(layer: str, neuron: int, asked: bool) -> Content:
            self.rendered.append((name, layer, neuron, asked))
            if name == "Second" and not asked:
                return Content(offer="do it")
            return Content((f"{name} {layer} {neuron}".encode(),), f"<p>{neuron}</p>")

        return render

    def last(self) -> tuple[str, str, int, bool]:
        return self.rendered[-1]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def titles(neurons: NeuronList) -> list[str]:
    return [button.description for button in neurons.titles.children]


def is_shown(widget: Any) -> bool:
    return bool(widget.layout.display != "none")


def click(neurons: NeuronList, title: str) -> None:
    (button,) = [one for one in neurons.titles.children if one.description.startswith(title)]
    button.click()


def test_opens_the_top_neuron(watched: Watched) -> None:
    board = watched.board
    top = int(watched.frames["b.0.up"]["wd"].to_numpy().argmax())
    assert watched.last() == ("First", "b.0.up", top, False)
    assert board.name.value == f"b.0.up {top} of 250"
    assert titles(board.neurons) == ["neuron", "wd ▼", "md"]
    assert len(board.neurons.lines.options) == PAGE
    assert board.neurons.lines.index == 0
    assert board.neurons.row.value == 1
    assert board.neurons.count.value == "of 250, listed 1–100"
    assert board.panes[0].pictures[0].value == f"First b.0.up {top}".encode()


def test_a_click_on_a_line_shows_that_neuron(watched: Watched) -> None:
    neurons = watched.board.neurons
    before = watched.board.panes[0].pictures[0].value
    wanted = neurons.table.neurons(0)[17]
    count = len(watched.rendered)
    neurons.lines.index = 17
    assert watched.rendered[count:] == [("First", "b.0.up", wanted, False)]
    assert neurons.find.value == wanted
    assert watched.board.panes[0].pictures[0].value != before


def test_a_click_on_a_title_sorts(watched: Watched) -> None:
    neurons = watched.board.neurons
    click(neurons, "md")
    assert titles(neurons) == ["neuron", "wd", "md ▼"]
    assert watched.last()[2] == 249
    assert neurons.lines.options[0].split()[0] == "249"
    click(neurons, "md")
    assert titles(neurons) == ["neuron", "wd", "md ▲"]
    assert watched.last()[2] == 0


def test_pages(watched: Watched) -> None:
    neurons = watched.board.neurons
    assert neurons.previous.disabled
    assert not neurons.next.disabled
    neurons.next.click()
    neurons.next.click()
    assert neurons.count.value == "of 250, listed 201–250"
    assert neurons.row.value == 201
    assert len(neurons.lines.options) == 50
    assert neurons.next.disabled
    assert watched.last()[2] == neurons.table.neurons(2)[0]
    neurons.lines.index = 49
    assert watched.last()[2] == neurons.table.neurons(2)[49]
    assert neurons.row.value == 250
    neurons.previous.click()
    assert neurons.count.value == "of 250, listed 101–200"


def test_rows_are_stepped_through_across_pages(watched: Watched) -> None:
    neurons = watched.board.neurons
    count = len(watched.rendered)
    for row in (2, 100, 101, 999):
        neurons.row.value = row
    expected = [
        neurons.table.neurons(page)[row] for page, row in ((0, 1), (0, 99), (1, 0), (2, 49))
    ]
    assert [neuron for _, _, neuron, _ in watched.rendered[count:]] == expected
    assert neurons.lines.index == 49


def test_a_neuron_is_found_by_its_number(watched: Watched) -> None:
    neurons = watched.board.neurons
    page, row = neurons.table.place(11)
    assert page > 0
    count = len(watched.rendered)
    neurons.find.value = 11
    assert watched.rendered[count:] == [("First", "b.0.up", 11, False)]
    assert (neurons.row.value, neurons.lines.index) == (page * PAGE + row + 1, row)
    neurons.find.value = 10_000
    assert watched.last()[2] == 249


def test_menus(watched: Watched) -> None:
    board = watched.board
    assert board.block.options == ("0", "1")
    assert board.projection.options == ("up", "down")
    board.projection.value = "down"
    assert (board.layer, len(board.neurons.lines.options)) == ("b.0.down", 3)
    board.block.value = "1"
    assert (board.layer, board.projection.options) == ("b.1.up", ("up",))
    assert watched.last()[1:3] == ("b.1.up", 0)
    assert board.neurons.previous.disabled
    assert board.neurons.next.disabled


def test_a_block_keeps_the_projection(watched: Watched) -> None:
    board = watched.board
    count = len(watched.rendered)
    board.block.value = "1"
    assert board.layer == "b.1.up"
    assert len(watched.rendered) == count + 1
    board.open("b.0.down", 2)
    assert watched.last()[1:3] == ("b.0.down", 2)
    assert len(watched.rendered) == count + 2
    board.block.value = "1"
    assert board.layer == "b.1.up"
    assert len(watched.rendered) == count + 3


def test_only_the_open_view_is_rendered(watched: Watched) -> None:
    board = watched.board
    assert {name for name, *_ in watched.rendered} == {"First"}
    count = len(watched.rendered)
    board.tabs.selected_index = 1
    neuron = board.neuron
    assert watched.rendered[count:] == [("Second", "b.0.up", neuron, False)]
    pane = board.panes[1]
    assert pane.button.description == "do it"
    assert is_shown(pane.button)
    assert not is_shown(pane.pictures[0])
    pane.button.click()
    assert watched.last() == ("Second", "b.0.up", neuron, True)
    assert not is_shown(pane.button)
    assert is_shown(pane.pictures[0])
    assert not is_shown(pane.pictures[1])


def test_a_failure_is_shown_and_raised() -> None:
    watched = Watched()

    def fails(_layer: str, _neuron: int, asked: bool) -> Content:
        if not asked:
            raise ZeroDivisionError
        return Content()

    watched.board.panes[0] = Pane(fails)
    with pytest.raises(ZeroDivisionError):
        watched.board.neurons.row.value = 3
    assert watched.board.panes[0].html.value == "<p>This view failed: ZeroDivisionError.</p>"
    watched.board.tabs.selected_index = 1
    assert watched.last()[0] == "Second"


def test_a_table_of_eleven_thousand_neurons_sends_one_page() -> None:
    chosen: list[int] = []
    neurons = NeuronList(chosen.append)
    neurons.show(NeuronTable.of(many("layer", 11_008)))
    assert len(neurons.lines.options) == PAGE
    assert neurons.row.max == 11_008
    assert len(chosen) == 1
