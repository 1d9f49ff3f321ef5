"""Arms measured one after the other, each kept as it finishes."""

from typing import TYPE_CHECKING

from entangle.ablation.arms import Arm
from entangle.ablation.folder import ArmFolder
from entangle.ablation.measures import Arrays, Meter
from entangle.progress import Progress

if TYPE_CHECKING:
    from entangle.ablation.bench import Bench


class ArmRunner:
    """Applies arms, measures them, and reads those that are finished.

    Parameters
    ----------
    bench, meter
        Apply and measure arms.
    folder
        Where finished ones are kept; None keeps none.
    bar
        Counts every arm.
    """

    def __init__(
        self, bench: "Bench", meter: Meter, folder: ArmFolder | None, bar: Progress
    ) -> None:
        self.bench = bench
        """Of these arms."""
        self._meter, self._folder, self._bar = meter, folder, bar

    def run(self, arm: Arm, *, step: bool = False) -> Arrays:
        """Return the raw numbers of an arm, measured unless they are kept.

        Parameters
        ----------
        arm
            What to measure.
        step
            Whether it is a step of a search: its rows are solved with all others of their layers,
            which random pruning depends on, and it is kept by itself.
        """
        key = f"step-{arm.key}" if step else arm.key
        found: Arrays | None = None
        if self._folder is not None:
            found = self._folder.read(key, self._meter.dense)
        if found is None:
            with self.bench.applied(arm):
                measured = self._meter.measure()
            if self._folder is not None:
                self._folder.write(key, measured)
            found = measured
        self._bar.advance()
        return found

    def skip(self, count: int) -> None:
        """Count arms that turned out not to be needed."""
        self._bar.advance(count)
