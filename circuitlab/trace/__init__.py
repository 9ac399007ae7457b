"""Watching one run of a module: the only code that runs a user's module to record it.

This package is callable, because the public name ``circuitlab.trace`` is both this package and the function
`circuitlab.trace.record.trace`, which a call of it is.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This module, made callable. Nothing is imported until it is called."""

    def __call__(self, model: Any, *args: Any, names: Any = None, device: str = "auto", **kwargs: Any) -> Any:
        """Run a module once and read off its wires. See `circuitlab.trace.record.trace`."""
        found = importlib.import_module("circuitlab.trace.record").trace
        return found(model, *args, names=names, device=device, **kwargs)


sys.modules[__name__].__class__ = _Callable
