"""Gluon's names, which Triton changes between 3.6 and 3.9, under one name each. Kernels import what differs from here alone.

| here | Triton 3.6 | Triton 3.9 |
|---|---|---|
| `tma_load(descriptor, coordinates, barrier, buffer)` | `tma.async_copy_global_to_shared` | `tma.async_load` |
| `tma_store(descriptor, coordinates, buffer)` | `tma.async_copy_shared_to_global` | `tma.async_store` |
| `partition_barrier()`: all threads of the running partition | `gl.thread_barrier` | `gl.barrier` |

What both have alike is imported from Triton where it is used.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.9 still has the old names, which raise: the new ones are asked for first.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def pair_barrier_sync(NUMBER: gl.constexpr):
    """Waits on the hardware's named barrier `NUMBER` ("9".."15": Triton takes the low ones) until 256 threads have come to it."""
    gl.inline_asm_elementwise(
        "bar.sync " + NUMBER + ", 256; mov.u32 $0, $1;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pair_barrier_arrive(NUMBER: gl.constexpr):
    """Comes to the named barrier `NUMBER` without waiting."""
    gl.inline_asm_elementwise(
        "bar.arrive " + NUMBER + ", 256; mov.u32 $0, $1;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
