"""Which module of a wire each neuron is in, from a `Partition` or from plain labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitlab.errors import InputError

Members = NDArray[np.int64]
"""Module of each neuron, 0 .. k-1."""


def members(partition: Any, *, size: int | None = None, wire: str = "") -> Members:
    """Module of each neuron.

    Args:
        partition: a `Partition`, or one integer from 0 for each neuron (array, tensor or list).
        size: number of neurons that there have to be.
        wire: name of the wire that a `Partition` has to be of.

    Raises:
        InputError: another wire, another number of neurons, or numbers that are no modules.
    """
    of = str(getattr(partition, "wire", "") or "")
    if wire and of and of != wire:
        raise InputError(f"this is a partition of {of}, and one of {wire} is needed; give the partition of that wire")
    given = getattr(partition, "labels", partition)
    given = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not len(given) or given.min() < 0:
        raise InputError(
            f"a partition is a cl.partition(...) or one module number from 0 for each neuron; this is a {type(partition).__name__} "
            f"with labels of shape {given.shape} and type {given.dtype}" + (", some negative" if given.dtype.kind == "i" and given.size and given.min() < 0 else "")
        )
    if size is not None and len(given) != size:
        raise InputError(f"this partition is of {len(given)} neurons, and {wire or 'the wire'} has {size}")
    return given.astype(np.int64)


def indicators(labels: Members) -> NDArray[np.float64]:
    """1 where a neuron is in a module: float64 (neurons, modules)."""
    return np.eye(int(labels.max()) + 1)[labels]
