"""Labels of examples or positions, aligned with batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.errors import InputError


class Labels:
    """Labels as users have them, as numbers for each batch.

    Args:
        given: None; a function of a batch; a tensor or array whose first axis counts all examples; or a sequence with
            an entry for each example: an integer, a string, or a sequence of them for each position.
        batches: what is walked.

    Attributes:
        names: of the labels, sorted; a label's number is its place. Negative integers and None mean no label.

    Raises:
        InputError: another number of labels than examples.
    """

    def __init__(self, given: Any, batches: Any) -> None:
        self.function = given if callable(given) else None
        self.names: tuple[str, ...] = ()
        self.starts: list[int] = []
        self.all: list[Any] | None = None
        if given is None:
            return
        if self.function is not None:
            found = [_plain(self.function(batch)) for batch in batches]
            self.perbatch: list[Any] | None = found
        else:
            self.perbatch = None
            if isinstance(given, str) or not (isinstance(given, Sequence) or hasattr(given, "__array__")):
                raise InputError(f"labels must be one for each example, or a function of a batch, and is a {type(given).__name__}")
            self.all = found = list(_plain(given))
            total = 0
            for batch in batches:
                self.starts.append(total)
                total += walked.examples(batch)
            self.starts.append(total)
            if len(found) != total:
                raise InputError(f"labels has {len(found)} entries, and the batches hold {total} examples: one is needed for each")
        distinct = {item for item in _flat(found) if not _none(item)}
        if not distinct:
            raise InputError("labels holds no label: all are None or negative")
        self.order = sorted(distinct, key=lambda item: (isinstance(item, str), item))
        self.names = tuple(map(str, self.order))
        self.number = {item: n for n, item in enumerate(self.order)}

    def of(self, number: int, batch: Any, device: torch.device) -> torch.Tensor | None:
        """int64 labels of one batch, -1 where there is none: (examples,) or (examples, positions)."""
        if not self.names:
            return None
        if self.perbatch is not None:
            part = self.perbatch[number]
        else:
            assert self.all is not None
            part = self.all[self.starts[number] : self.starts[number + 1]]

        def numbered(item: Any) -> Any:
            if isinstance(item, list):
                return [numbered(inner) for inner in item]
            return -1 if _none(item) else self.number[item]

        try:
            return torch.tensor(numbered(part), dtype=torch.int64, device=device)
        except ValueError:
            raise InputError(f"labels of batch {number} have rows of different lengths: give one for each position, and None "
                             "for positions that are padding") from None


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, all the way down."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any) -> Any:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _none(item: Any) -> bool:
    return item is None or (isinstance(item, int) and item < 0)
