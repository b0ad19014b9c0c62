"""A fixed list of kernel calls run as one call into C."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from graphserve.kernels.cpu.build import Library

MAX_CACHE_GROUPS = 16


class _Launch(ctypes.Structure):
    _fields_ = [("function", ctypes.c_void_p), ("pointers", ctypes.c_void_p)]


class CompiledSequence:
    """Kernel calls with fixed pointers, run in order by :meth:`run`.

    Invariant: holds addresses only. The caller keeps the tensors, and the library, alive and in place.
    """

    def __init__(self, library: Library, launches: Sequence[tuple[int, Sequence[int | None]]]) -> None:
        """Prepare the calls.

        Args:
            library: loaded kernels; also holds the loop itself.
            launches: for each call the function's address and its pointers (data_ptr(), None for an absent tensor).
        """
        self._library = library
        self._pointers = [(ctypes.c_void_p * len(pointers))(*pointers) for _, pointers in launches]
        self._launches = (_Launch * len(launches))(
            *(
                _Launch(function, ctypes.addressof(pointers))
                for (function, _), pointers in zip(launches, self._pointers, strict=True)
            )
        )
        self._scalars = (ctypes.c_int64 * (4 + MAX_CACHE_GROUPS))()
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)(
            library.function_pointer("gs_run")
        )
        self._addresses = (ctypes.addressof(self._launches), len(launches), ctypes.addressof(self._scalars))

    def run(
        self, num_tokens: int, num_rows: int, num_sequences: int, num_threads: int, table_lens: Sequence[int] = ()
    ) -> None:
        """Run all calls; the GIL is released meanwhile.

        Args:
            num_tokens: T of the step, padding included.
            num_rows: R, rows of logits.
            num_sequences: S.
            num_threads: size of the OpenMP team.
            table_lens: row length of each cache group's block table.

        Raises:
            ValueError: more cache groups than the scalar array holds.
        """
        if len(table_lens) > MAX_CACHE_GROUPS:
            raise ValueError(f"{len(table_lens)} cache groups given, at most {MAX_CACHE_GROUPS} are supported")
        scalars = self._scalars
        scalars[0], scalars[1], scalars[2], scalars[3] = num_tokens, num_rows, num_sequences, num_threads
        for group, length in enumerate(table_lens):
            scalars[4 + group] = length
        self._run(*self._addresses)
