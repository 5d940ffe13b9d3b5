"""The elementwise half of the angular loss on CPUs, compiled once by the machine's C++ compiler.

`angular_sweep.cpp` does in one pass over the pairs what PyTorch does in fifteen. Without a compiler, or where it does
not take the flags, `load` says so once and returns None: callers then use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("angular_sweep.cpp")
# No -ffast-math: a NaN has to stay one. The two flags allow vector instructions for roots and comparisons.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # compilers choose 256 for fear of a lower clock: 10 to 20 % slower here
_POINTER, _INT64, _INT32, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_ARGUMENTS: list[Any] = [
    _POINTER, _INT64, _INT64, _INT64, _POINTER, _INT64, _INT64, _POINTER, _POINTER, _INT64, _POINTER, _INT64,
    _INT64, _INT32, _INT32, _FLOAT, _FLOAT, _POINTER, _POINTER, _INT64, _INT32,
]  # fmt: skip

_log = logging.getLogger(__name__)


@functools.cache
def load() -> Callable[..., None] | None:
    """The compiled function, or None where it cannot be had; compiles in half a second if nobody did before.

    The library lies in the user's cache folder under a name made of source, flags, compiler and processor. It is put
    there by a rename: processes that start together may compile it twice, but none ever waits for another or loads
    half a file.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        if compiler is None:
            raise OSError("no C++ compiler found; set CXX or install g++")
        library = ctypes.CDLL(str(_built(compiler)))
        function = library.angular_sweep
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        details = getattr(error, "stderr", None) or str(error)
        _log.warning("angular dispersion loss: runs in PyTorch alone, which is slower (%s)", details.strip()[-300:])
        return None
    function.argtypes, function.restype = _ARGUMENTS, None
    return function


def _built(compiler: str) -> Path:
    parts = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), os.path.realpath(compiler).encode(), _processor()]
    name = f"angular_sweep-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dispersion_pretrain"
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            draft = Path(folder) / name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(draft)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            draft.replace(cache / name)
    return cache / name


def _processor() -> bytes:
    """What -march=native depends on: a cache folder may be shared by machines that differ."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    lines = [
        line for line in text.split("\n\n")[0].splitlines() if line.startswith(("model name", "flags", "Features"))
    ]
    return "\n".join([platform.machine(), *lines]).encode()


class AngularSums:
    """What the loss and its gradient sum over pairs, added up block by block."""

    def __init__(
        self, own_scale: Tensor, own_along: Tensor, pool_scale: Tensor, *, edge: float, temperature: float
    ) -> None:
        """Start from zero.

        Args:
            own_scale, pool_scale: (sets, own tokens), (sets, pool tokens), float32 on the CPU: what turns a vector into
                a unit vector.
            own_along: (sets, own tokens) scale / norm: what a unit vector's gradient takes off along the vector.
            edge: largest cosine that is not clamped.
        """
        self._own_scale, self._own_along = own_scale.contiguous(), own_along.contiguous()
        self._pool_scale = pool_scale.contiguous()
        self._edge, self._rate = edge, -1.0 / (math.pi * temperature)
        # of exp(-D / tau), number of clamped pairs, of the cosine
        self.sums = torch.zeros(own_scale.shape[0], 3, dtype=torch.float64)
        self.dots = torch.zeros_like(self._own_scale)  # row by row, sum over j of weight x cosine

    def add_rows_against_pool(self, gram: Tensor, *, first_set: int, first_row: int, diagonal: int) -> None:
        """Own rows against the whole pool; inner products become weights, in place.

        Args:
            gram: (sets, rows, pool tokens), contiguous.
            diagonal: column in which the first of the rows meets itself.
        """
        pool = self._pool_scale[first_set:]
        self._call(gram, gram, pool, diagonal, first_set, first_row, symmetric=False)

    def add_rows_against_rest(self, gram: Tensor, weights: Tensor, *, first_set: int, first_row: int) -> None:
        """Rows against themselves and all later rows of their set; each pair counts in both orders.

        Args:
            gram: (sets, rows, tokens - first_row), contiguous. Left of the diagonal it is not read.
            weights: gram itself, or at least as many sets of (tokens - first_row, tokens - first_row), which are then
                also filled by symmetry below the rows.
        """
        rest = self._own_scale[first_set:, first_row:]
        self._call(gram, weights, rest, 0, first_set, first_row, symmetric=True)

    def _call(
        self,
        gram: Tensor,
        weights: Tensor,
        column_scale: Tensor,
        diagonal: int,
        first_set: int,
        first_row: int,
        *,
        symmetric: bool,
    ) -> None:
        function = load()
        assert function is not None, "callers ask `load` first"
        scale, along, dots = (rows[first_set:, first_row:] for rows in (self._own_scale, self._own_along, self.dots))
        function(
            gram.data_ptr(), *gram.shape, weights.data_ptr(), *weights.stride()[:2],
            scale.data_ptr(), along.data_ptr(), scale.stride(0), column_scale.data_ptr(), column_scale.stride(0),
            diagonal, symmetric, weights is not gram, self._edge, self._rate,
            self.sums[first_set:].data_ptr(), dots.data_ptr(), dots.stride(0), torch.get_num_threads(),
        )  # fmt: skip
