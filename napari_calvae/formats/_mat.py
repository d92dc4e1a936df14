"""Variables of MATLAB files, of version 7.3 (HDF5) or older, with the axes that they have in MATLAB."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError

from napari_calvae.formats._files import check_claims

#: What reading a file may raise that is not what it seems.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    MatReadError,
    zlib.error,
)
_NUMBERS = ("double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names of the variables in a file and the shapes of numerical arrays, () for all else."""
    if not h5py.is_hdf5(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = whosmat(path, appendmat=False)
        return {name: tuple(shape) if kind in _NUMBERS else () for name, shape, kind in found}
    with h5py.File(path) as file:
        return {
            name: item.shape[::-1]
            if isinstance(item, h5py.Dataset) and _kind(item) in _NUMBERS and not _is_empty(item)
            else ()
            for name, item in file.items()
            if not name.startswith("#")
        }


def variables(path: Path, names: Collection[str]) -> dict[str, Any]:
    """Read those of some variables that are there, without axes of length one.

    Arrays are arrays, texts are texts, structures are dictionaries; cells and arrays of structures are lists.
    """
    if not h5py.is_hdf5(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a variable that cannot be read is a text that says so
            found = loadmat(path, appendmat=False, variable_names=list(names), simplify_cells=True)
        return {name: found[name] for name in names if name in found}
    with h5py.File(path) as file:
        check_claims(file, path)
        return {name: _plain(file[name], file) for name in names if name in file}


def _kind(item: h5py.Dataset) -> str:
    """Name of MATLAB's class of a variable; files that others wrote as HDF5 do not tell."""
    stated = item.attrs.get("MATLAB_class", b"double" if item.dtype.kind in "fiub" else b"")
    return stated.decode() if isinstance(stated, bytes) else str(stated)


def _is_empty(item: h5py.Dataset) -> bool:
    """Tell whether a dataset is the shape of an empty array and not its values."""
    return bool(item.attrs.get("MATLAB_empty", 0)) or not item.size


def _plain(item: Any, file: h5py.File) -> Any:
    """Turn a variable of a file of version 7.3 into what ``variables`` promises."""
    if isinstance(item, h5py.Group):
        fields = {name: _plain(each, file) for name, each in item.items()}
        if fields and all(isinstance(each, list) for each in fields.values()):
            return [dict(zip(fields, each, strict=True)) for each in zip(*fields.values(), strict=True)]
        return fields
    if h5py.check_ref_dtype(item.dtype):
        return [_plain(file[reference], file) for reference in item[()].ravel() if reference]
    if _is_empty(item):
        return np.empty(0)
    if _kind(item) == "char":
        return "".join(map(chr, item[()].ravel()))
    return item[()].T.squeeze()
