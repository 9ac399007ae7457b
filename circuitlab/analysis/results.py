"""Results on disk: one file format for all of them, NumPy's .npz with a JSON header.

A result is a frozen dataclass that derives from `Result`. Its fields are arrays, tensors, numbers, text, None, tuples,
lists and dicts of these, and other dataclasses of circuitlab; all come back as they were. Nothing in a file is run.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Self, cast
from zipfile import BadZipFile

import numpy as np

from circuitlab.errors import FileFormatError, InputError

FORMAT_VERSION = 1
_HEADER = "circuitlab"


class Result:
    """Parent of the results of analyses: they can be saved and loaded."""

    def save(self, path: str | Path) -> Path:
        """Write the result as ``.npz``; `load` reads it back.

        Raises:
            InputError: another suffix.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(f"{type(self).__name__} is saved as .npz, not {path.suffix or 'without a suffix'!r}: try {path.with_suffix('.npz').name!r}")
        arrays: dict[str, Any] = {}
        content = _encode(self, arrays)
        header = json.dumps({"format": "circuitlab.result", "version": FORMAT_VERSION, "content": content})
        partial = path.with_name(path.name + ".part")
        with open(partial, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{_HEADER: np.array(header)}, **arrays)
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileFormatError: a broken file, one of a newer circuitlab, or one that holds another kind of result.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(str(archive[_HEADER]))
                if header.get("format") != "circuitlab.result" or header.get("version") != FORMAT_VERSION:
                    raise FileFormatError(
                        f"{path} has format {header.get('format')!r}, version {header.get('version')!r}; this circuitlab "
                        f"reads results of version {FORMAT_VERSION}: update circuitlab, or measure again"
                    )
                result = _decode(header["content"], archive)
        except (KeyError, TypeError, ValueError, AttributeError, EOFError, ImportError, BadZipFile) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"{path} is no result that circuitlab saved, or it is broken ({type(error).__name__}: {error})") from None
        if not isinstance(result, cls):
            raise FileFormatError(f"{path} holds a {type(result).__name__}, not a {cls.__name__}; load it with {type(result).__name__}.load")
        return result


def _encode(value: Any, arrays: dict[str, Any]) -> Any:
    """Plain JSON; arrays go into the dict under a number."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):
        key = f"a{len(arrays)}"
        torch_dtype = "" if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")
        plain: Any = value if isinstance(value, np.ndarray) else value.detach().cpu()
        if torch_dtype == "bfloat16":
            plain = plain.float()
        arrays[key] = np.asarray(plain)
        return {"array": key, "torch": torch_dtype}
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        return {
            "dataclass": f"{kind.__module__}:{kind.__qualname__}",
            "fields": {f.name: _encode(getattr(value, f.name), arrays) for f in fields(value) if f.init},
        }
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encode(v, arrays) for v in cast("list[Any]", value)]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, arrays), _encode(v, arrays)] for k, v in cast("dict[Any, Any]", value).items()]}
    raise InputError(f"a result that holds a {type(value).__name__} cannot be saved")


def _decode(value: Any, arrays: Any) -> Any:
    if not isinstance(value, dict):
        return value
    value = cast("dict[str, Any]", value)
    if "array" in value:
        array = arrays[value["array"]]
        if not value["torch"]:
            return array
        import torch

        return torch.from_numpy(np.array(array)).to(getattr(torch, value["torch"]))
    if "tuple" in value:
        return tuple(_decode(v, arrays) for v in value["tuple"])
    if "list" in value:
        return [_decode(v, arrays) for v in value["list"]]
    if "dict" in value:
        return {_decode(k, arrays): _decode(v, arrays) for k, v in value["dict"]}
    module, _, name = value["dataclass"].partition(":")
    if module.partition(".")[0] != "circuitlab":
        raise FileFormatError(f"a saved result names a class outside circuitlab, {value['dataclass']!r}")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise FileFormatError(f"a saved result names {value['dataclass']!r}, which holds no data")
    return cast("Any", kind)(**{k: _decode(v, arrays) for k, v in value["fields"].items()})
