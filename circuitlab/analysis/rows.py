"""What feed-forward blocks compute in one run, as rows (positions, neurons), with what is known of each position.

A block's values may come in several parts, and those of experts come for the positions alone that were sent to them, sorted by
expert. Which rows of the input these are is known if they were picked by an index, which the tap follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.feedforward import FeedForward
from circuitlab.analysis.tap import Origin, Tap
from circuitlab.errors import InputError


@dataclass
class Parts:
    """What one block did in one run: several tensors if it is called in parts.

    Attributes:
        hidden: values of the wire, (..., neurons), and inputs: of the block, (..., inputs), in the order of the calls.
        origins: of the inputs, where they were picked from a larger tensor.
        groups: of the hidden values, the ends of each expert's rows where a grouped product has them.
    """

    hidden: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    inputs: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    origins: list[Origin | None] = field(default_factory=list["Origin | None"])
    groups: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])


def run(model: torch.nn.Module, batch: Any, blocks: Mapping[str, FeedForward]) -> dict[str, Parts]:
    """Run a model on a batch: wire -> what its block did."""
    parts = {wire: Parts() for wire in blocks}

    def visit(wire: str, hidden: torch.Tensor) -> None:
        parts[wire].hidden.append(hidden)
        parts[wire].groups.append(tap.groups)

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
        self.wire, self.examples = wire, examples
        paired = [h.shape[:-1] for h in parts.hidden] == [x.shape[:-1] for x in parts.inputs]
        self.picked: list[tuple[torch.Tensor, int]] = []
        leads = block.batch is not None
        for number, hidden in enumerate(parts.hidden):
            inputs = parts.inputs[number] if paired else None
            origin = parts.origins[number] if paired and block.picked else None
            group = parts.groups[number]
            if block.expert is not None and block.experts is None and group is not None:
                one = slice(int(group[block.expert - 1]) if block.expert else 0, int(group[block.expert]))
                hidden, inputs = hidden[one], None if inputs is None else inputs[one]
                origin = None if origin is None else (origin[0][one], origin[1])
            self.hidden.append(_flat(hidden, block))
            self.inputs.append(None if inputs is None else _flat(inputs, block))
            if origin is not None:
                self.picked.append(origin)
        self.total = sum(len(rows) for rows in self.hidden)
        grouped = block.expert is not None and block.experts is None
        self.whole = leads and len(self.hidden) == 1 and not grouped
        self.mask = self._spread(mask, "mask")
        self.marks = self._spread(marks, "labels")

    def _spread(self, given: torch.Tensor | None, what: str) -> torch.Tensor | None:
        """What is given for each example or position, for each row."""
        if given is None:
            return None
        if self.hidden and len(self.picked) == len(self.hidden):
            found = [_of_rows(given, total)[rows] for rows, total in self.picked if total % max(given.numel(), 1) == 0]
            if len(found) == len(self.picked):
                return torch.cat(found)
        if not self.whole or self.total % max(given.numel(), 1):
            if what == "labels":
                raise InputError(f"{what}: the {self.total} positions of {self.wire} cannot be told apart by {tuple(given.shape)} "
                                 "labels; give one for each example, or for each position, or leave this wire out")
            return None
        return _of_rows(given, self.total)


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
