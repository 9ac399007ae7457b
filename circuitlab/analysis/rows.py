"""What feed-forward blocks compute in one run, as rows (positions, neurons), with what is known of each position.

A block's values may come in several parts, and those of experts come for the positions alone that were sent to them. Which rows of
the input these are is known if they were picked by an index, which the tap follows, as it does what picks an expert of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.tap import Expert, Origin, Tap
from circuitlab.errors import InputError


@dataclass
class Parts:
    """What one block did in one run: several tensors if it is called in parts.

    Attributes:
        hidden: values of the wire, (..., neurons), and inputs: of the block, (..., inputs), in the order of the calls.
        origins: of the inputs, where they were picked from a larger tensor.
        experts: of the hidden values, where one of many is picked.
    """

    hidden: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    inputs: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    origins: list[Origin | None] = field(default_factory=list["Origin | None"])
    experts: list[Expert] = field(default_factory=list["Expert"])


def run(model: torch.nn.Module, batch: Any, blocks: Mapping[str, FeedForward]) -> dict[str, Parts]:
    """Run a model on a batch: wire -> what its block did."""
    parts = {wire: Parts() for wire in blocks}

    def visit(wire: str, hidden: torch.Tensor) -> None:
        parts[wire].hidden.append(hidden)
        parts[wire].experts.append(tap.expert)

    def enter(wire: str, inputs: torch.Tensor) -> None:
        parts[wire].inputs.append(inputs)
        parts[wire].origins.append(tap.origin)

    args, kwargs = walked.inputs_of(model, batch)
    with walked.running(model, batch), Tap(model, blocks, visit, enter) as tap:
        model(*args, **kwargs)
    return parts


class Rows:
    """Hidden values as rows (positions, neurons), with what is known of each position.

    Args:
        parts: what the block did.
        block: one expert alone, where many are stacked.
        examples: of the batch.
        mask, marks: of the batch's examples or positions: whether they count, and their labels.
        wire: for errors.

    Attributes:
        hidden: rows, in parts. inputs: those of the block's inputs; None where they do not fit.
        mask, marks: for all rows of all parts, or None.
    """

    def __init__(
        self, parts: Parts, block: FeedForward, examples: int, mask: torch.Tensor | None, marks: torch.Tensor | None, wire: str
    ) -> None:
        self.hidden: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor | None] = []
        self.wire, self.total = wire, 0
        paired = [h.shape[:-1] for h in parts.hidden] == [x.shape[:-1] for x in parts.inputs]
        self.places: list[Origin | None] = []
        one = block.expert if block.experts is None else None
        own = [n for n, picked in enumerate(parts.experts) if one is None or not isinstance(picked, int) or picked == one]
        for number in own:
            origin = parts.origins[number] if paired and block.picked else None
            hidden, inputs = _flat(parts.hidden[number], block), _flat(parts.inputs[number], block) if paired else None
            if origin is not None:
                place = _flat(origin[0][..., None], block)[:, 0], origin[1]
            elif block.batch is not None and len(own) == 1:
                place = torch.arange(len(hidden), device=hidden.device), len(hidden)
            else:
                place = None
            if one is not None:
                keep = self._sent(parts.experts[number], len(hidden), one)
                hidden, inputs = hidden[keep], None if inputs is None else inputs[keep]
                place = None if place is None else (place[0][keep], place[1])
            self.hidden.append(hidden)
            self.inputs.append(inputs)
            self.places.append(place)
            self.total += len(hidden)
        self.mask = self._spread(mask, "mask")
        self.marks = self._spread(marks, "labels")

    def _sent(self, picked: Expert, rows: int, expert: int) -> slice | torch.Tensor:
        """Which rows were sent to an expert."""
        if isinstance(picked, torch.Tensor) and picked.ndim and picked.numel() == rows:
            return picked.flatten() == expert
        if picked is None or (isinstance(picked, torch.Tensor) and picked.numel() > 1):
            raise InputError(f"it is not known which expert each of {rows} positions of {self.wire} was sent to: the matrices are picked "
                             "by numbers in a way that cannot be followed; index the first dimension of the parameter")
        return slice(None) if int(picked) == expert else slice(0)

    def _spread(self, given: torch.Tensor | None, what: str) -> torch.Tensor | None:
        """What is given for each example or position, for each row."""
        if given is None:
            return None
        places = [place for place in self.places if place is not None and not place[1] % max(given.numel(), 1)]
        if len(places) < len(self.hidden) or not places:
            if what == "labels" and self.total:
                raise InputError(f"{what}: the {self.total} positions of {self.wire} cannot be told apart by {tuple(given.shape)} "
                                 "labels; give one for each example, or for each position, or leave this wire out")
            return None
        return torch.cat([_of_rows(given, total)[rows] for rows, total in places])


def _of_rows(given: torch.Tensor, total: int) -> torch.Tensor:
    return given.reshape(-1).repeat_interleave(total // given.numel())


def _flat(values: torch.Tensor, block: FeedForward) -> torch.Tensor:
    """Values of shape (..., neurons) as rows, examples first; those of one expert where a dimension counts experts."""
    leading = block.batch
    if block.expert is not None and block.experts is not None:
        values = values.select(block.experts, block.expert)
        leading = None if leading is None else leading - (block.experts < leading)
    if leading and values.ndim > leading + 1:
        values = values.movedim(leading, 0)
    return values.flatten(0, -2) if values.ndim > 1 else values[None]
