"""The errors a user meets. Each says what was given, where, and what to try next."""

from __future__ import annotations

from typing import Any


class CircuitlabError(Exception):
    """Parent of every error that circuitlab raises on purpose."""


class InputError(CircuitlabError, ValueError):
    """An argument that circuitlab cannot work with: a wrong name, suffix, size or type."""


class FileFormatError(CircuitlabError, ValueError):
    """A saved circuit that is broken, or was written by a newer circuitlab."""


class VerificationError(CircuitlabError):
    """A claim could not even be tested, because the circuit and the model do not belong together."""


class TraceError(CircuitlabError, RuntimeError):
    """The model could not be traced.

    Attributes:
        module: path of the submodule that was running, "" for the root.
        source: "file.py:line" of the failing line in the user's code, "" if not known.
        circuit: the `Circuit` of what was traced before the failure, None if nothing was.
    """

    def __init__(
        self,
        message: str,
        *,
        module: str = "",
        source: str = "",
        circuit: Any = None,
    ) -> None:
        super().__init__(message)
        self.module = module
        self.source = source
        self.circuit = circuit
