"""Gluon's names, which Triton changes between 3.6 and 3.9, under one name each. Kernels import what differs from here alone.

| here | Triton 3.6 | Triton 3.9 |
|---|---|---|
| `tma_load(descriptor, coordinates, barrier, buffer)` | `tma.async_copy_global_to_shared` | `tma.async_load` |
| `tma_store(descriptor, coordinates, buffer)` | `tma.async_copy_shared_to_global` | `tma.async_store` |
| `tma_add(descriptor, coordinates, buffer)`: adds to memory | not public | `tma.async_atomic_add` |
| `reinterpret(buffer, dtype, shape, layout)` | `buffer._reinterpret` | `buffer.reinterpret` |
| `partition_barrier()`: all threads of the running partition | `gl.thread_barrier` | `gl.barrier` |

What both have alike is imported from Triton where it is used.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.9 still has the old names, which raise: the new ones are asked for first.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@builtin
def _tma_add(tensor_desc, coord, src, _semantic=None):
    coordinates = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coordinates, src.handle
    )


tma_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_add


@builtin
def reinterpret(buffer, dtype, shape, layout, _semantic=None):
    """Shared memory seen as tensors of another shape and layout."""
    method = buffer.reinterpret if hasattr(buffer, "reinterpret") else buffer._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


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
