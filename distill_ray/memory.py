"""What the C library does with memory that a model gives back after every batch."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
# In a process's environment, with value 1: its threads share the main thread's heap, which has no largest block.
ONE_HEAP = "MALLOC_ARENA_MAX"
_LARGEST_ACTIVATION = 2**30
_MORE_THAN_A_HEAP = 2**27  # the heaps of threads are of 64 MiB


@cache
def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the rest of this process; whether it will.

    glibc maps every block above 32 MiB anew and unmaps it when it is freed, so that each batch's activations are paged
    in and zeroed again: the article's teacher at batches of 256 labels 2,100 rows a second of CPU time instead of 5,300
    (bf16, one thread, glibc 2.36). Threads other than the main one, in which Ray runs its work and torch its backward
    pass, allocate from heaps of 64 MiB of their own, which are unmapped as well once they are free: 4,200 instead of
    5,300. A heap stays while the room in it is less than the padding. A block larger than such a heap is mapped anew
    whatever is set here, unless the process was started with ``ONE_HEAP``: in fp32, whose activations are of 64 MiB at
    batches of 256, 850 instead of 1,050. What a process holds then stays at its largest batch.
    """
    with suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        wanted = {
            _M_ARENA_MAX: 1, _M_TOP_PAD: _MORE_THAN_A_HEAP, _M_MMAP_THRESHOLD: _LARGEST_ACTIVATION,
            _M_TRIM_THRESHOLD: 2**31 - 1,
        }  # fmt: skip
        return 0 not in {libc.mallopt(parameter, value) for parameter, value in wanted.items()}
    return False
