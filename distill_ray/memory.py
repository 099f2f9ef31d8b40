"""What the C library does with memory that a model gives back after every batch."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_ACTIVATION = 2**30


@cache
def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the rest of this process; whether it will.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed, so that each batch's activations are paged
    in and zeroed again: the article's teacher at batches of 256 labels 2,100 rows a second of CPU time instead of 5,300
    (bf16, one thread, glibc 2.36). What a process holds then stays at its largest batch.
    """
    with suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        kept = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_ACTIVATION)
        return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    return False
