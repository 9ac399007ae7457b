"""Data on a device, in as few shards as fit: it is walked once, however many points are evaluated on it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from circuitlab.analysis import batches as walked
from circuitlab.errors import InputError
from circuitlab.trace.events import tensors_in


@dataclass(frozen=True)
class Shard:
    """Some batches on the device.

    Attributes:
        batches: the batches. sets: number of the set of data that each is of.
        number: of the first batch among all.
        last: no shard follows.
    """

    batches: list[Any]
    sets: list[int]
    number: int
    last: bool


def shards(data: Mapping[str, Any], device: torch.device, room: float | None = None) -> Iterator[Shard]:
    """Walk sets of data once, in shards that fit into memory; usually that is one.

    Args:
        data: batches by the name of their set.
        device: where they are wanted.
        room: bytes that batches may take beside those that are there already; None is half of what is free.

    Raises:
        InputError: a set has no batches.
    """
    room = free(device) if room is None else room
    batches: list[Any] = []
    sets: list[int] = []
    number, held = 0, 0.0
    for which, given, batch in _all(data):
        there = _bytes(batch) if isinstance(given, (list, tuple)) else {}
        kept = walked.to_device(batch, device)
        if not isinstance(given, (list, tuple, DataLoader)):
            kept = walked.mapped(kept, torch.clone)  # whatever yields it may write the next one to the same memory
        new = sum(size for at, size in _bytes(kept).items() if at not in there)
        if batches and held + new > room:
            yield Shard(batches, sets, number, last=False)
            number += len(batches)
            batches, sets, held = [], [], 0.0
        batches.append(kept)
        sets.append(which)
        held += new
    yield Shard(batches, sets, number, last=True)


def _all(data: Mapping[str, Any]) -> Iterator[tuple[int, Any, Any]]:
    for which, (name, batches) in enumerate(data.items()):
        none = True
        for batch in batches:
            none = False
            yield which, batches, batch
        if none:
            raise InputError(f"the {name} batches are empty: there is nothing to run the model on")


def _bytes(batch: Any) -> dict[int, int]:
    return {tensor.data_ptr(): tensor.nbytes for _, tensor in tensors_in(batch, torch.Tensor)}


def free(device: torch.device) -> float:
    """Half of the free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):  # not a Unix: two gigabytes
        return 2.0**31


def print_of(value: Any) -> int:
    """A number that tells values apart by their tensors: batches, or the numbers of models."""
    found = 0
    for path, tensor in tensors_in(value, torch.Tensor):
        found = zlib.crc32(f"{path} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        if tensor.numel():
            plain = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            found = zlib.crc32(memoryview(plain.numpy()), found)
    return found
