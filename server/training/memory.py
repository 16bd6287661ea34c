"""How this process keeps memory. Knows the C library, nothing of models."""

import ctypes

_M_TRIM_THRESHOLD = -1  # <malloc.h>
_M_MMAP_THRESHOLD = -3
_ALWAYS_FROM_HEAP_BYTES = 1 << 30
_NEVER_TRIM_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed; tell whether the C library could be asked.

    By default glibc maps every tensor of a few megabytes anew and gives it back at once, and the kernel zeroes its pages each
    time: measured on SmolLM2, that was half of a training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _ALWAYS_FROM_HEAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES))
