"""Evaluating points on any `concurrent.futures.Executor`: threads, processes, or a cluster.

Workers keep what they need (the model, the batches) from unit to unit. It is sent to a worker that says it has not got it,
so it travels about once to each, and again to one that was started anew. What an executor that broke leaves undone is
evaluated here.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import pickle
import socket
import threading
import uuid
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitlab.analysis.bench import Bench, Weights, Work
from circuitlab.errors import InputError

Unit = tuple[int, int, int]
"""(number of a point, first batch, end)."""

KEPT = 2
"""Pieces of work that a worker keeps."""


class _Desk:
    """Work in this process, and copies of its model that no thread is using."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.idle: list[Bench] = []

    def evaluate(self, point: Weights, start: int, stop: int) -> NDArray[np.float64]:
        try:
            bench = self.idle.pop()
        except IndexError:
            bench = Bench(self.work)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found = bench.evaluate([point], start, stop)[0].double().cpu().numpy()
        self.idle.append(bench)
        return found


_DESKS: OrderedDict[str, _Desk] = OrderedDict()
_LOCK = threading.Lock()


def _unit(key: str, payload: bytes | None, threads: int, point: Weights, start: int, stop: int) -> tuple[str, NDArray[np.float64] | None]:
    """Runs on a worker: who it is, and what it found; None if it has not got the work."""
    who = f"{socket.gethostname()}:{os.getpid()}"
    if torch.get_num_threads() != threads:  # sums that other numbers of threads share out are rounded otherwise
        torch.set_num_threads(threads)
    with _LOCK:
        desk = _DESKS.get(key)
        if desk is None:
            if payload is None:
                return who, None
            desk = _DESKS[key] = _Desk(_unpacked(payload))
            while len(_DESKS) > KEPT:
                _DESKS.popitem(last=False)
    return who, desk.evaluate(point, start, stop)


def _packed(work: Work) -> bytes:
    pickler: Any = pickle
    if importlib.util.find_spec("cloudpickle"):  # it takes functions and classes of a notebook too
        pickler = importlib.import_module("cloudpickle")
    file = io.BytesIO()
    try:
        torch.save(work, file, pickle_module=pickler)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InputError(
            f"the model, the batches, the loss or a metric cannot be sent to the executor's workers ({error}); define classes and "
            "functions in a module that can be imported, install cloudpickle, or use a ThreadPoolExecutor"
        ) from None
    return file.getvalue()


def _unpacked(payload: bytes) -> Work:
    here = None if torch.cuda.is_available() else "cpu"
    return torch.load(io.BytesIO(payload), map_location=here, weights_only=False)


def run(executor: Executor, work: Work, points: Sequence[Weights], units: Sequence[Unit]) -> Iterator[tuple[Unit, NDArray[np.float64]]]:
    """Evaluate units on an executor, and yield each when it is done: batch means, (batches, quantities).

    Workers use as many threads as torch has here, so that they find the same bits.

    Whatever ends it, units that have not begun are cancelled, and nothing of it stays in this process.
    """
    key = uuid.uuid4().hex
    with _LOCK:
        _DESKS[key] = _Desk(work)
        _DESKS.move_to_end(key, last=True)
    waiting, running = deque(units), dict[Future[Any], Unit]()
    workers: set[str] = set()
    payload: bytes | None = None
    asked = 0  # workers that have not got the work
    try:
        while waiting or running:
            while waiting and len(running) < 4 + 2 * len(workers):
                at, start, stop = unit = waiting[0]
                running[executor.submit(_unit, key, payload if asked else None, torch.get_num_threads(), tuple(points[at]), start, stop)] = unit
                waiting.popleft()
                asked = max(asked - 1, 0)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                who, found = future.result()
                workers.add(who)
                unit = running.pop(future)
                if found is None:
                    payload, asked = _packed(work) if payload is None else payload, asked + 1
                    waiting.appendleft(unit)
                else:
                    yield unit, found
    except Exception as error:
        if not _broke(error):
            raise
        left = [*running.values(), *waiting]
        running.clear()
        warnings.warn(f"the executor broke ({type(error).__name__}: {error}); what was left, {len(left)} of {len(units)} units, is evaluated here")
        desk = _Desk(work)
        for unit in left:
            yield unit, desk.evaluate(points[unit[0]], unit[1], unit[2])
    finally:
        wait([future for future in running if not future.cancel()])  # threads would go on to draw from torch's random state
        with _LOCK:
            _DESKS.pop(key, None)


def _broke(error: Exception) -> bool:
    """Whether it is the executor that failed, and not the model."""
    cluster = type(error).__module__.partition(".")[0] == "distributed"
    return cluster or isinstance(error, (BrokenExecutor, CancelledError)) or "after shutdown" in str(error)
