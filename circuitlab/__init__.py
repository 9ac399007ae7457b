"""circuitlab: a visual notebook for looking inside neural networks. Conventional alias: ``import circuitlab as cl``.

The public names are loaded when they are first used, so that ``import circuitlab`` is quick and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitlab.analysis.curve import curve as curve
    from circuitlab.analysis.expert_curve import expert_curve as expert_curve
    from circuitlab.analysis.experts import to_moe as to_moe
    from circuitlab.analysis.landscape import interpolate as interpolate
    from circuitlab.analysis.matching import match as match
    from circuitlab.analysis.modularity import partition as partition
    from circuitlab.analysis.neurons import observe as observe
    from circuitlab.analysis.plane import plane as plane
    from circuitlab.analysis.ridge import ridge as ridge
    from circuitlab.analysis.stitch import stitch as stitch
    from circuitlab.circuit import Circuit as Circuit
    from circuitlab.circuit import load as load
    from circuitlab.errors import CircuitlabError as CircuitlabError
    from circuitlab.trace.record import trace as trace
    from circuitlab.widgets.lab import explore as explore

__version__ = "0.1.0"

_WHERE = {
    "Circuit": "circuitlab.circuit",
    "CircuitlabError": "circuitlab.errors",
    "curve": "circuitlab.analysis.curve",
    "expert_curve": "circuitlab.analysis.expert_curve",
    "explore": "circuitlab.widgets.lab",
    "interpolate": "circuitlab.analysis.landscape",
    "load": "circuitlab.circuit",
    "match": "circuitlab.analysis.matching",
    "observe": "circuitlab.analysis.neurons",
    "partition": "circuitlab.analysis.modularity",
    "plane": "circuitlab.analysis.plane",
    "ridge": "circuitlab.analysis.ridge",
    "stitch": "circuitlab.analysis.stitch",
    "to_moe": "circuitlab.analysis.experts",
}
__all__ = ["Circuit", "CircuitlabError", "curve", "expert_curve", "explore", "interpolate", "load", "match", "observe", "partition", "plane", "ridge", "stitch", "to_moe", "trace"]


def __getattr__(name: str) -> Any:
    if name == "trace":  # the package is itself callable
        return importlib.import_module("circuitlab.trace")
    if name not in _WHERE:
        raise AttributeError(f"module 'circuitlab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
