"""Dictionaries that other programs keep in ``.npy`` files, that is as pickles: read without running what they name.

A pickle is a program: it may name any function and call it. Of what it names only arrays, scalars, plain containers,
dates and paths are let through here, and even these are not the real classes but functions of this module, which check
what they are given.
"""

from __future__ import annotations

import collections
import datetime
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np

from napari_calvae.formats._files import DAMAGE
from napari_calvae.recording import RecordingError


def load_dicts(path: Path) -> list[dict[str, Any]]:
    """Read the dictionary, or the array of dictionaries, that ``numpy.save`` put into a file.

    Parameters
    ----------
    path
        A ``.npy`` file of Python objects, by any version of NumPy since 1.7.

    Returns
    -------
    list of dict
        The dictionaries in their order; one alone is a list of one. Paths in them are pure paths.

    Raises
    ------
    RecordingError
        If the file is damaged or holds something else, above all objects that are neither NumPy's nor plain ones.
    """
    try:
        with open(path, "rb") as file:
            shape, dtype = _header(file)
            if not dtype.hasobject:
                raise RecordingError(f"{path.name}: expected dictionaries, got an array of numbers, {dtype} {shape}.")
            _check_memo(file)
            found = _Unpickler(file, path.name).load()
        if not isinstance(found, np.ndarray) or found.shape != shape:
            raise ValueError(f"no array of shape {shape} in it")
    except RecordingError:
        raise
    except DAMAGE as error:
        raise RecordingError(
            f"{path.name}: expected a NumPy file of dictionaries, got one that cannot be read ({error}). "
            "It may be incomplete: copy it again from where it was made."
        ) from error
    dicts = found.ravel().tolist()
    if not all(isinstance(each, dict) for each in dicts):
        raise RecordingError(f"{path.name}: expected dictionaries, got other objects. Is it from another program?")
    return dicts


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array in a NumPy file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the NumPy format")
    return shape, dtype


def _check_memo(file: BinaryIO) -> None:
    """Refuse places to remember objects at that are beyond the length of the pickle: all up to them are allocated."""
    begin = file.tell()
    content = file.read()
    for operation, place, _ in pickletools.genops(io.BytesIO(content)):
        if operation.name.endswith("PUT") and int(place or 0) > len(content):
            raise ValueError(f"{len(content)} bytes that hold an object number {place}")
    file.seek(begin)


class _Dtype:
    """Type of plain numbers or texts, as a pickle describes it."""

    def __init__(self, name: str, *_: Any):
        self.dtype = np.dtype(str(name)[:32])
        if self.dtype.kind not in "biufcSUO" or self.dtype.subdtype:
            raise ValueError(f"values of the type {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise ValueError("values with a structure")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Array that checks what a pickle says of it: NumPy trusts the number of objects that it is told."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, described, fortran, data = state
        dtype = described.dtype
        size = math.prod(int(n) for n in shape)
        if (len(data) != size) if dtype.hasobject else (len(data) != size * dtype.itemsize):
            raise ValueError(f"an array of shape {tuple(shape)} with {len(data)} items or bytes")
        if not isinstance(data, list if dtype.hasobject else bytes):
            raise TypeError(f"values of an array in a {type(data).__name__}")
        super().__setstate__((version, tuple(shape), dtype, bool(fortran), data))  # type: ignore[arg-type]


def _new_array(*_: Any) -> _Array:
    """Make the empty array that a pickle then fills, whatever class and shape it asks for."""
    return np.ndarray.__new__(_Array, (0,), "b")


def _new_scalar(described: _Dtype, data: bytes) -> Any:
    """Make a NumPy number or text from its bytes."""
    dtype = described.dtype
    if dtype.hasobject or len(data) != dtype.itemsize:
        raise ValueError(f"a scalar {dtype} of {len(data)} bytes")
    return np.frombuffer(data, dtype)[0] if data else dtype.type()


#: What a pickle may name, and what it gets.
_ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _new_array,
    "numpy.dtype": _Dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _new_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _new_scalar for core in ("core", "_core")},
    **{f"builtins.{kind.__name__}": kind for kind in (complex, dict, frozenset, list, set, slice, tuple)},
    "collections.OrderedDict": collections.OrderedDict,
    **{
        f"datetime.{kind.__name__}": kind
        for kind in (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)
    },
    **{
        f"{module}.{name}": kind
        for module in ("pathlib", "pathlib._local")
        for kind, names in {
            PurePosixPath: ("PosixPath", "PurePosixPath"),
            PureWindowsPath: ("WindowsPath", "PureWindowsPath"),
        }.items()
        for name in names
    },
}


class _Unpickler(pickle.Unpickler):
    """Reads plain data, and refuses a pickle that names anything else."""

    def __init__(self, file: Any, name: str):
        super().__init__(file)
        self.name = name

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function that the pickle names."""
        wanted = _ALLOWED.get(f"{module}.{name}")
        if wanted is None:
            raise RecordingError(
                f"{self.name}: expected arrays, numbers, texts and plain containers, got {module}.{name}, which is "
                "refused: loading it could run foreign code. If you trust the file, load it with the program that made "
                "it and save plain values."
            )
        # Each time a new function: a pickle may set attributes of what it gets.
        return lambda *arguments: wanted(*arguments)
