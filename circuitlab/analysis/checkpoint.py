"""The file of an unfinished sweep: what was found of each point and batch, and of which models and data it is."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.analysis.results import Result
from circuitlab.analysis.shards import print_of
from circuitlab.analysis.states import Combination
from circuitlab.errors import InputError

Floats = NDArray[np.float64]
Known = Mapping[bytes, tuple[Floats, NDArray[np.bool_]]]
"""Weights of a point -> (batches, quantities) means, and (batches,) which are there."""

SECONDS = 10.0
"""Between two writes."""


@dataclass(frozen=True, eq=False)
class Checkpoint(Result):
    """The batch means of an unfinished sweep, as they are kept on disk.

    Attributes:
        about: what was evaluated: models, quantities and corrections. way: how.
        prints: a number for each batch that tells it apart.
        points: float64 (points, models). values: float64 (points, batches, quantities). done: bool (points, batches).
    """

    about: dict[str, str]
    way: str
    prints: tuple[int, ...]
    points: Floats
    values: Floats
    done: NDArray[np.bool_]


class Checkpoints:
    """Reads the file of a sweep, checks that it is of this one, and writes it now and then.

    Args:
        path: of the file; one that is not there is begun.
        family: whose points are evaluated.
        about: what else decides what is found.

    Raises:
        InputError: a file of another sweep, or a path that cannot be written.
        FileFormatError: a file that holds something else.
    """

    def __init__(self, path: Path, family: Combination, about: Mapping[str, str]) -> None:
        if path.suffix != ".safetensors":
            raise InputError(f"resume={str(path)!r}: the file is written as .safetensors; try {path.with_suffix('.safetensors').name!r}")
        if not path.parent.is_dir():
            raise InputError(f"resume={str(path)!r}: there is no folder {str(path.parent)!r} to write it to")
        moving = "all" if family.moving is None else str(zlib.crc32("\n".join(sorted(family.moving)).encode()))
        self.path = path
        self.about = {"models": str([print_of(dict(state)) for state in family.states]), "layers": moving, **about}
        self.prints: list[int] = []
        self.old: tuple[int, ...] = ()
        self.way: str | None = None
        self.known: Known = {}
        self.written = time.monotonic()
        if path.exists():
            self._read()

    def _read(self) -> None:
        kept = Checkpoint.load(self.path)
        different = [name for name, told in self.about.items() if kept.about.get(name) != told]
        if different:
            told = "; ".join(f"{name} was {kept.about.get(name)!r}, and is {self.about[name]!r}" for name in different)
            raise InputError(f"resume={str(self.path)!r} holds a sweep of other {' and '.join(different)}: {told}. Name another file, or "
                             "delete this one")
        self.old, self.way = kept.prints, kept.way or None
        self.known = {row.tobytes(): (values.copy(), done.copy())
                      for row, values, done in zip(kept.points, kept.values, kept.done, strict=True)}

    def see(self, number: int, batch: Any) -> None:
        """Note a batch; an `InputError` if it is not what it was."""
        self.prints.append(print_of(batch))
        if number < len(self.old) and self.prints[number] != self.old[number]:
            raise InputError(f"resume={str(self.path)!r}: batch {number} is not the one that was evaluated before; a loader that shuffles "
                             "gives other batches each time: give a list of batches, or a DataLoader with shuffle=False")

    def write_now_and_then(self, known: Known, way: str | None) -> None:
        """Write, if it is a while ago."""
        if time.monotonic() - self.written > SECONDS:
            self.write(known, way)

    def write(self, known: Known, way: str | None) -> None:
        """Write what is known, whole or not at all."""
        prints = (*self.prints, *self.old[len(self.prints) :])
        rows = [row for row, (_, done) in known.items() if done.any()]
        if not rows:
            return
        quantities = known[rows[0]][0].shape[1]
        values = np.full((len(rows), len(prints), quantities), np.nan)
        done = np.zeros((len(rows), len(prints)), dtype=bool)
        for at, row in enumerate(rows):
            found, there = known[row]
            values[at, : len(found)], done[at, : len(there)] = found, there
        points = np.stack([np.frombuffer(row) for row in rows])
        Checkpoint(self.about, way or "", prints, points, values, done).save(self.path)
        self.written = time.monotonic()
