"""Compiles kernels and runs them in torch's own OpenMP team: its threads are awake already, and no others stand beside them.

libgomp's GOMP_parallel(function, data, threads, flags) is what a compiler makes of `#pragma omp parallel`
(https://gcc.gnu.org/onlinedocs/libgomp/Implementing-PARALLEL-construct.html).
"""

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding
from numba import cfunc, types

from server.inference.kernels.memory import load_integer
from server.inference.kernels.products import compiled

_FOLDER = Path(__file__).parent
# Names of our own for two functions of torch's libgomp: a process may hold other copies of that library.
_THREAD, _THREADS = "model_training_thread", "model_training_threads"
thread_number: Any = types.ExternalFunction(_THREAD, types.intc())
thread_count: Any = types.ExternalFunction(_THREADS, types.intc())
# Products and sums of numbers below which waking the team takes longer than the work.
SMALL_WORK = 100_000
# The first entries of each block: where a team keeps numbers meanwhile, and how many of them each thread has.
SCRATCH, SCRATCH_NUMBERS, FIRST_OWN = range(3)
HALF_BYTES, NUMBER_BYTES, INTEGER_BYTES = 2, 4, 8


class Block:
    """The 64-bit integers that a kernel is called with: two for its scratch, then sizes and addresses of its own."""

    def __init__(self, *values: int) -> None:
        self.values = (ctypes.c_int64 * (FIRST_OWN + len(values)))(0, 0, *values)
        self.address = ctypes.addressof(self.values)


class Kernel:
    """A function of a block's address, compiled when it is first run or taken from numba's cache."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Where its machine code lies."""
        find_team()
        # numba's cache looks at a function's own file, not at those that it calls: the name says for which text of all of them it is.
        self._function.__qualname__ += f"_{_read_digest()}"
        # Beside the code or not at all: elsewhere it would be code that a service whose own code is read-only can change.
        self._compiled = cfunc(types.void(types.intp), cache=os.access(_FOLDER, os.W_OK))(self._function)
        return int(self._compiled.address or 0)

    @cached_property
    def call(self) -> Callable[[int], None]:
        """Run it in this thread alone."""
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


@cache
def _read_digest() -> str:
    texts = [path.read_bytes() for path in sorted(_FOLDER.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


@compiled
def find_scratch(block: int) -> int:
    """Give the address of this thread's scratch."""
    address: int = load_integer(block, SCRATCH) + thread_number() * load_integer(block, SCRATCH_NUMBERS) * NUMBER_BYTES
    return address


class Team:
    """Torch's OpenMP threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, function in ((_THREAD, library.omp_get_thread_num), (_THREADS, library.omp_get_num_threads)):
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        self._kept = threading.local()

    def run(self, kernel: Kernel, block: Block, work: int, scratch_numbers: int = 0) -> None:
        """Run a kernel in each thread, or in this one where there is little to do: `work` counts products and sums.

        Each thread has `scratch_numbers` float32 numbers of its own meanwhile.
        """
        threads = 1 if work < SMALL_WORK else torch.get_num_threads()
        if scratch_numbers:
            block.values[SCRATCH], block.values[SCRATCH_NUMBERS] = self._reserve(scratch_numbers * threads), scratch_numbers
        if threads == 1:  # a team of one would send the others away
            kernel.call(block.address)
        else:
            self._parallel(kernel.address, block.address, threads, 0)

    def _reserve(self, needed: int) -> int:
        """Give the address of so many numbers; one thread's kernels run after each other and share them."""
        kept = getattr(self._kept, "scratch", None)
        if kept is None or kept.numel() < needed:
            kept = self._kept.scratch = torch.empty(needed, dtype=torch.float32)
        return int(kept.data_ptr())


@cache
def find_team() -> Team | None:
    """Find the libgomp that torch brought; None where torch works with something else."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        return Team(ctypes.CDLL(str(path)))
    return None


def find_team_for(dtype: torch.dtype, device: torch.device) -> Team | None:
    """Give the team where kernels can work on such numbers; None elsewhere."""
    return find_team() if device.type == "cpu" and dtype == torch.bfloat16 else None
