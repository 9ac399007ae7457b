"""What the modules of a wire do at each position: their share of what the block writes, over tokens.

The activity of a module at a position is ``Σ_j |h_j|·‖V_j‖`` over its neurons, as a share of that sum over all neurons.
"""

from __future__ import annotations

import heapq
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from circuitlab.analysis import batches as walked
from circuitlab.analysis.experts import block_of
from circuitlab.analysis.results import Result
from circuitlab.analysis.tap import Tap
from circuitlab.errors import InputError


@dataclass(frozen=True)
class Timeline(Result):
    """Activity of modules along one example.

    Attributes:
        tokens: what stands at each position.
        shares: wire name -> float64 (modules, positions), each column sums to 1 (to 0 where no neuron is active).
    """

    tokens: tuple[str, ...]
    shares: dict[str, torch.Tensor]

    def to_frame(self) -> Any:
        """Wire, module, position, token and share, as a pandas DataFrame."""
        import pandas as pd

        rows = [
            (wire, module, position, self.tokens[position], float(share))
            for wire, matrix in self.shares.items() for module, line in enumerate(matrix) for position, share in enumerate(line)
        ]
        return pd.DataFrame(rows, columns=["wire", "module", "position", "token", "share"])

    def plot(self, **options: Any) -> Any:
        """Token x module as a plotly Figure. See `circuitlab.plots.timeline`."""
        return importlib.import_module("circuitlab.plots").timeline(self, **options)


@dataclass(frozen=True)
class TopPositions(Result):
    """Where each module is most active.

    Attributes:
        rows: (wire, module, example, position, share, text), best first within each module.
    """

    rows: tuple[tuple[str, int, int, int, float, str], ...]

    def of(self, wire: str, module: int) -> tuple[tuple[int, int, float, str], ...]:
        """(example, position, share, text) of one module, best first."""
        return tuple(row[2:] for row in self.rows if row[:2] == (wire, module))

    def to_frame(self) -> Any:
        """Wire, module, example, position, share and text, as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["wire", "module", "example", "position", "share", "text"])


def timeline(
    model: torch.nn.Module, partitions: Mapping[str, Any], batch: Any, tokens: Sequence[str] | None = None, *, example: int = 0
) -> Timeline:
    """Activity of the modules of wires along one example.

    Args:
        model: is not changed.
        partitions: wire name -> `Partition`.
        batch: a batch, whose example of that number is looked at.
        tokens: what stands at each position; numbers by default.
        example: which one of the batch.

    Raises:
        InputError: partitions of another model, or tokens of another number than positions.
    """
    with walked.evaluated(model) as copied:
        shares = _shares(copied, partitions, walked.to_device(batch, walked.device_of(copied)))
    count = walked.examples(batch)
    if not -count <= example < count:
        raise InputError(f"example={example}, and the batch holds {count}")
    found = {wire: share[example].T.cpu() for wire, share in shares.items()}
    positions = {share.shape[1] for share in found.values()}
    if len(positions) > 1:
        raise InputError(f"the wires {', '.join(found)} have different numbers of positions ({positions}): look at them one by one")
    length = positions.pop()
    named = tuple(map(str, tokens if tokens is not None else range(length)))
    if len(named) != length:
        raise InputError(f"tokens has {len(named)} entries, and the example {length} positions")
    return Timeline(named, found)


def top_positions(
    model: torch.nn.Module, partitions: Mapping[str, Any], batches: Any, *, n: int = 10,
    text: Callable[[Any, int, int], str] | None = None, progress: bool = True,
) -> TopPositions:
    """The positions at which each module is most active, over batches.

    Args:
        model: is not changed.
        partitions: wire name -> `Partition`.
        batches: what can be walked again.
        n: how many of each module.
        text: what to show of a position: gets the batch, the number of the example in it, and the position.
        progress: show a progress bar.
    """
    walked.check(batches)
    best: dict[tuple[str, int], list[tuple[float, int, int, str]]] = {}
    start = 0
    with walked.evaluated(model) as copied:
        device = walked.device_of(copied)
        for _, batch in walked.walk(batches, device, what="looking for the most active positions", progress=progress):
            for wire, share in _shares(copied, partitions, batch).items():
                width = share.shape[1]
                values, places = share.flatten(0, 1).topk(min(n, share.shape[0] * width), 0)
                for module in range(share.shape[2]):
                    heap = best.setdefault((wire, module), [])
                    for value, place in zip(values[:, module].tolist(), places[:, module].tolist(), strict=True):
                        if len(heap) == n and value <= heap[0][0]:
                            break
                        at, position = divmod(place, width)
                        shown = text(batch, at, position) if text else ""
                        (heapq.heappushpop if len(heap) == n else heapq.heappush)(heap, (value, -start - at, -position, shown))
            start += walked.examples(batch)
    return TopPositions(tuple(
        (wire, module, -example, -position, value, shown)
        for (wire, module), heap in best.items() for value, example, position, shown in sorted(heap, reverse=True)
    ))


def _shares(model: torch.nn.Module, partitions: Mapping[str, Any], batch: Any) -> dict[str, torch.Tensor]:
    """Wire name -> float64 (examples, positions, modules)."""
    blocks = {wire: block_of(wire, part, model) for wire, part in partitions.items()}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    count = walked.examples(batch)
    found: dict[str, torch.Tensor] = {}

    def visit(wire: str, hidden: torch.Tensor) -> None:
        value = blocks[wire].values[0]
        norms = value.of(named[value.parameter].detach()).norm(dim=1)
        leading = blocks[wire].batch
        if leading is None or wire in found:
            raise InputError(f"the positions of {wire} cannot be told apart: its block is called in parts, or positions are sorted")
        moved = hidden.movedim(leading, 0) if leading and hidden.ndim > leading + 1 else hidden
        size = (moved.abs() * norms).reshape(count, -1, len(norms)).double()
        labels = torch.as_tensor(partitions[wire].labels, device=size.device).long()
        sums = size.new_zeros(*size.shape[:2], int(labels.max()) + 1).index_add_(2, labels, size)
        found[wire] = sums / sums.sum(2, keepdim=True).clamp(min=1e-300)

    args, kwargs = walked.inputs_of(model, batch)
    with walked.running(model, batch), Tap(model, blocks, visit):
        model(*args, **kwargs)
    return cast("dict[str, torch.Tensor]", {wire: found[wire] for wire in partitions})
