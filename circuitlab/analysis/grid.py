"""Points of a plane: where they are, in which order they are evaluated, and what was found there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis.sweep import Sweep, Sweeper
from circuitlab.errors import InputError

Floats = NDArray[np.float64]

def sizes(grid: Any, *, line: bool = False) -> tuple[int, ...]:
    """Numbers of points of a grid along its axes, checked.

    Raises:
        InputError: no grid.
    """
    given = (grid,) if line and isinstance(grid, int) else (grid, grid) if isinstance(grid, int) else grid
    try:
        found = tuple(int(size) for size in given)
        whole = all(size == own for size, own in zip(found, given, strict=True))
    except (TypeError, ValueError):
        found, whole = (), False
    if not whole or len(found) not in ((1, 2) if line else (2,)) or min(found) < 2:
        raise InputError(f"grid={grid!r}: give the numbers of points along both axes, such as (25, 25), each at least 2"
                         + ("; one number is a line" if line else ""))
    return found


def coarse_first(*counts: int) -> NDArray[np.int64]:
    """Flat numbers of a grid's points, so that those evaluated so far are spread over all of it."""
    levels = [np.array([_twos(at) for at in range(count)]) for count in counts]
    level = np.minimum.reduce(np.meshgrid(*levels, indexing="ij"))
    return np.argsort(-level.ravel(), kind="stable")


def _twos(number: int) -> int:
    """How often a number can be halved."""
    return 64 if number == 0 else (number & -number).bit_length() - 1


def evaluate(
    sweeper: Sweeper, first: Sequence[Sequence[float]], axes: Sequence[Floats], weigh: Callable[..., Sequence[float]],
    made: Callable[[Sweep, Floats], Any], *, seen: Callable[[Any], None] | None, progress: bool, what: str,
) -> Any:
    """Evaluate single points, and then a grid, coarse to fine.

    Args:
        sweeper: of the family.
        first: weights of the single points.
        axes: coordinates along each axis.
        weigh: gives the weights at coordinates.
        made: gives the result of a sweep and of the quantities on the grid, float64 (sets, [y,] x, quantities).
        seen: is called with the result so far.
        progress, what: of the progress bar.

    Returns:
        the result.
    """
    counts = [len(axis) for axis in reversed(axes)]
    order = coarse_first(*counts)
    cells = [[axis[at] for axis, at in zip(axes, reversed(place), strict=True)] for place in np.ndindex(*counts)]
    rows = np.array([*first, *(weigh(*cells[at]) for at in order)], dtype=np.float64)

    def result(found: Sweep) -> Any:
        values = np.full((len(found.sets), len(cells), len(found.names)), np.nan)
        values[:, order] = found.values[:, len(first) :]
        return made(found, values.reshape(len(found.sets), *counts, len(found.names)))

    def tell(at: int, values: Any) -> None:
        if seen is not None:
            seen(result(sweeper.so_far(rows)))

    return result(sweeper.run(rows, tell if seen is not None else None, progress=progress, what=what))


def grid_frame(values: Floats, sets: Sequence[str], names: Sequence[str], axes: Sequence[Floats]) -> Any:
    """A row for each set of data and point of a grid, as a pandas DataFrame."""
    import pandas as pd

    counts = [len(axis) for axis in reversed(axes)]
    columns = [name for name, _ in zip("xy", axes, strict=False)]
    rows = [(kind, *(axis[at] for axis, at in zip(axes, reversed(place), strict=True)), *values[(which, *place)])
            for which, kind in enumerate(sets) for place in np.ndindex(*counts)]
    return pd.DataFrame(rows, columns=["set", *columns, *names])
