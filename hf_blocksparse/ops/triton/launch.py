"""Host side of the kernels: which arguments they get, and a launch that costs the CPU little.

Imports Triton, so it is itself imported at the first call only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_blocksparse.block_index import BlockIndex, Strips
from hf_blocksparse.ops.problem import Problem, empty_rows_like
from hf_blocksparse.ops.triton.backward import grad_key_value_kernel, grad_query_kernel
from hf_blocksparse.ops.triton.column_parts import (
    ROWS_AT_ONCE,
    SplitColumns,
    add_parts_kernel,
    column_parts_for,
)
from hf_blocksparse.ops.triton.decode import Partials, combine_kernel, decode_kernel
from hf_blocksparse.ops.triton.decode_sizes import (
    DecodeSizes,
    decode_sizes,
    num_splits,
)
from hf_blocksparse.ops.triton.forward import forward_kernel
from hf_blocksparse.ops.triton.recordings import current_stream, start, watched
from hf_blocksparse.ops.triton.tile_sizes import (
    FIXED_KEYS,
    GATHERED_RATE,
    Direction,
    TileSizes,
    backend_of,
    gathered_tile_sizes,
    narrow_rate,
    narrow_tile_sizes,
    tile_sizes,
)
from hf_blocksparse.ops.triton.tiles import Dropout, StridedRows, TileLists

IS_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)
"""Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on CPU tensors, slowly."""

LOG2_E = 1.4426950408889634
SPLITS_AT_ONCE = 16
MAX_INT32 = 2**31 - 1
IS_HIP = torch.version.hip is not None
REMEMBERED_VARIANTS = 4096

_NO_ROWS = StridedRows(None, (0, 0, 0))
_compiled: dict[tuple[Any, ...], Any] = {}
_checked_descriptors: dict[tuple[Any, ...], dict[str, Any]] = {}
_lists_of: WeakKeyDictionary[BlockIndex, tuple[TileLists, TileLists]] = WeakKeyDictionary()


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without gradients; `scale` is positive."""
    batch, heads, query_len, _ = query.shape
    sizes, index = _sizes_and_index(query, key, value, problem, "forward")
    items = problem.sequences.q_items(index.tile_q)
    packing = _packing(sizes, index, heads, heads // key.shape[1])
    out = empty_rows_like(query, value.shape[-1])
    lse = query.new_empty(batch, heads, query_len, dtype=torch.float32)
    if not problem.sequences.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    score_scale, softcap_scale = _score_scales(scale, problem.softcap)
    with current_device(query.device):
        launch(
            forward_kernel,
            (items.shape[0], packing.num_packs, 1),
            (
                _rows(query),
                _rows(key),
                _rows(value),
                _descriptor(key, sizes.tile_kv, sizes.strip),
                _descriptor(value, sizes.tile_kv, sizes.strip),
                sinks,
                _rows(out),
                _rows(lse),
                items,
                problem.sequences.table,
                tile_lists(index)[0],
                score_scale,
                softcap_scale,
                _slopes(alibi_slopes, score_scale),
                _dropout(problem),
                heads // key.shape[1],
                packing.heads_per_list,
            ),
            _constants(query, value, sizes) | dict(STRIP=sizes.strip, MEMBERS=packing.members),
            _options(sizes),
        )
    return out, lse


def launch_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    problem: Problem,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`launch_forward` for the calls of which `has_few_queries` is true."""
    batch, heads, query_len, head_dim = query.shape
    sequences, value_dim = problem.sequences, value.shape[-1]
    group_size = heads // key.shape[1]
    sizes = decode_sizes(
        *backend_of(query.device),
        head_dim,
        value_dim,
        query.element_size(),
        problem.block_size,
    )
    index = problem.index_for(sizes.tile_q, sizes.tile_kv, True)
    # Heads of one key head whose lists differ are walked one by one: their union would be read for each of them.
    heads_per_list = math.gcd(group_size, index.heads_per_list)
    members = min(_padded(heads_per_list), sizes.max_rows)
    packs = heads // heads_per_list * -(-heads_per_list // members)
    queries = max(16 // members, min(_padded(query_len), sizes.tile_q, sizes.max_rows // members))
    tiles = (query_len + sizes.tile_q - 2) // sizes.tile_q + 1
    if sequences.is_uniform:
        last_tile = (sequences.query_end - 1) // sizes.tile_q
        tiles = last_tile - sequences.query_begin // sizes.tile_q + 1
    chunks_per_tile = -(-min(query_len, sizes.tile_q) // queries)
    num_programs = sequences.num_sequences * -(-query_len // queries) * packs
    splits = num_splits(num_programs, index.longest_row, query.device)

    out = empty_rows_like(query, value_dim)
    lse = query.new_empty(batch, heads, query_len, dtype=torch.float32)
    num_rows = lse.numel()
    partials = None
    if splits > 1:
        values = query.new_empty(splits, num_rows, value_dim, dtype=torch.float32)
        maxima, sums = query.new_empty(2, splits, num_rows, dtype=torch.float32)
        partials = Partials(values, maxima, sums)
        if not sequences.covers_queries:
            sums.zero_()
    elif not sequences.covers_queries:
        out.zero_()
        lse.fill_(float("-inf"))
    out_rows, lse_rows = _rows(out), _rows(lse)
    score_scale, softcap_scale = _score_scales(scale, problem.softcap)
    constants = _constants(query, value, sizes)
    precision = constants.pop("INPUT_PRECISION")
    with current_device(query.device):
        launch(
            decode_kernel,
            (sequences.num_sequences * tiles * chunks_per_tile, packs, splits),
            (
                _rows(query),
                _rows(key),
                _rows(value),
                sinks,
                out_rows,
                lse_rows,
                partials,
                sequences.table,
                tile_lists(index)[0],
                index.first_q_tile,
                tiles * chunks_per_tile,
                chunks_per_tile,
                heads_per_list,
                heads,
                num_rows,
                query_len,
                score_scale,
                softcap_scale,
                _slopes(alibi_slopes, score_scale),
                group_size,
            ),
            constants | dict(QUERIES=queries, MEMBERS=members, INPUT_PRECISION=precision),
            _options(sizes),
        )
        if partials is not None:
            launch(
                combine_kernel,
                (num_rows, 1, 1),
                (partials, out_rows, lse_rows, splits, num_rows, heads, query_len),
                dict(
                    VALUE_DIM=value_dim,
                    VALUE_DIM_PADDED=_padded(value_dim),
                    SPLITS_AT_ONCE=SPLITS_AT_ONCE,
                ),
                {},
            )
    return out, lse


def launch_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    scale: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and sinks; None where `needed` (one flag each) says so."""
    heads, kv_heads = query.shape[1], key.shape[1]
    sequences = problem.sequences
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    log2_sums, deltas = torch.empty_like(lse), torch.empty_like(lse)
    score_scale, softcap_scale = _score_scales(scale, problem.softcap)
    slopes = _slopes(alibi_slopes, score_scale)
    dropout = _dropout(problem)
    query_rows, key_rows, value_rows, grad_out_rows = map(_rows, (query, key, value, grad_out))
    log2_sum_rows, delta_rows = _rows(log2_sums), _rows(deltas)
    grad_key = grad_value = grad_sinks = None
    with current_device(query.device):
        # Also where the query needs no gradient: the kernel makes the row terms, which all the others need.
        sizes, index = _sizes_and_index(query, key, value, problem, "grad_query")
        items = sequences.q_items(index.tile_q)
        packing = _packing(sizes, index, heads, heads // kv_heads)
        grad_query = empty_rows_like(query, query.shape[-1])
        if not sequences.covers_queries:
            grad_query.zero_()
            log2_sums.fill_(float("inf"))
            deltas.zero_()
        launch(
            grad_query_kernel,
            (items.shape[0], packing.num_packs, 1),
            (
                query_rows,
                key_rows,
                value_rows,
                _rows(out),
                grad_out_rows,
                _rows(lse),
                _NO_ROWS if grad_lse is None else _rows(grad_lse),
                log2_sum_rows,
                delta_rows,
                _descriptor(key, sizes.tile_kv, sizes.strip),
                _descriptor(value, sizes.tile_kv, sizes.strip),
                _rows(grad_query),
                items,
                sequences.table,
                tile_lists(index)[0],
                scale,
                score_scale,
                softcap_scale,
                slopes,
                dropout,
                heads // kv_heads,
                packing.heads_per_list,
            ),
            _constants(query, value, sizes) | dict(STRIP=sizes.strip, MEMBERS=packing.members),
            _options(sizes),
        )
        if needed[1] or needed[2]:
            sizes, index = _sizes_and_index(query, key, value, problem, "grad_key_value")
            items = sequences.kv_items(sizes.tile_kv)
            grad_key = empty_rows_like(key, key.shape[-1])
            grad_value = empty_rows_like(value, value.shape[-1])
            if not sequences.covers_keys:
                grad_key.zero_()
                grad_value.zero_()
            lists = tile_lists(index)[1]
            constants = _constants(query, value, sizes)
            parts = column_parts_for(
                index, sequences, lists, heads, kv_heads, sizes.tile_q, sizes.tile_kv,
                sizes.num_warps,
            )  # fmt: skip
            programs = key_parts = value_parts = None
            grid = (items.shape[0], kv_heads, 1)
            if parts is not None:
                programs = parts.programs
                grid = (programs.shape[0], 1, 1)
                rows = parts.split.num_slots, sizes.tile_kv
                key_parts, value_parts = (
                    query.new_empty(*rows, constants[name], dtype=torch.float32)
                    for name in ("HEAD_DIM_PADDED", "VALUE_DIM_PADDED")
                )
            launch(
                grad_key_value_kernel,
                grid,
                (
                    query_rows,
                    key_rows,
                    value_rows,
                    grad_out_rows,
                    log2_sum_rows,
                    delta_rows,
                    _descriptor(query, sizes.tile_q, sizes.strip),
                    _descriptor(grad_out, sizes.tile_q, sizes.strip),
                    _rows(grad_key),
                    _rows(grad_value),
                    items,
                    sequences.table,
                    lists,
                    scale,
                    score_scale,
                    softcap_scale,
                    slopes,
                    dropout,
                    heads // kv_heads,
                    kv_heads,
                    programs,
                    key_parts,
                    value_parts,
                ),
                constants | dict(STRIP=sizes.strip),
                _options(sizes),
            )
            if parts is not None:
                value_scale = 1.0 if dropout is None else dropout.keep_scale
                launch_add_parts(
                    parts.split, key_parts, value_parts, grad_key, grad_value, scale, value_scale
                )
    if sinks is not None and needed[3]:
        # p of the sink itself is exp(sink - lse), and its value is 0. Rows of no sequence have +inf here.
        sink_share = torch.exp2(sinks.detach().float()[:, None] * LOG2_E - log2_sums)
        grad_sinks = -(sink_share * deltas).sum((0, 2), dtype=torch.float64).to(sinks.dtype)
    return grad_query if needed[0] else None, grad_key, grad_value, grad_sinks


def launch_add_parts(
    split: SplitColumns,
    key_parts: Tensor,
    value_parts: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    key_scale: float,
    value_scale: float,
) -> None:
    """Write the gradients of the key tiles that were split, from float32 parts [slots, tile_kv, padded dim]."""
    tile_kv = key_parts.shape[1]
    launch(
        add_parts_kernel,
        (split.table.shape[0], tile_kv // ROWS_AT_ONCE, 1),
        (
            key_parts,
            value_parts,
            _rows(grad_key),
            _rows(grad_value),
            split.table,
            key_scale,
            value_scale,
        ),
        dict(
            HEAD_DIM=grad_key.shape[-1],
            HEAD_DIM_PADDED=key_parts.shape[2],
            VALUE_DIM=grad_value.shape[-1],
            VALUE_DIM_PADDED=value_parts.shape[2],
            TILE_KV=tile_kv,
            ROWS=ROWS_AT_ONCE,
        ),
        {},
    )


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    kind: tuple[Any, ...] | None = None,
) -> None:
    """Run a kernel; `constants` are its last parameters, in their order, `options` the compiler's (`num_warps`, ...).

    Triton finds the compiled variant by asking each of some sixty values whether it is 1 or a multiple of 16, which takes longer than
    a short attention. The answers follow from the strides and alignments in `_kind_of`, so the variant is looked up by those and
    started as a compiled kernel. A caller that knows what they follow from gives that as `kind`.
    """
    if IS_INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    device = torch.cuda.current_device()
    if kind is None:
        kind = tuple(map(_kind_of, arguments))
    variant = (kernel, device, kind, *constants.values(), *options.values())
    compiled = _compiled.get(variant)
    if compiled is None:
        # Triton's default of fusing products changes between releases.
        compiled = kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)
        if hasattr(compiled, "result"):
            compiled = compiled.result()
        if len(_compiled) >= REMEMBERED_VARIANTS:
            _compiled.clear()
        _compiled[variant] = compiled
    else:
        start(compiled, grid, (*arguments, *constants.values()), current_stream())
    recorder = watched()
    if recorder is not None:
        recorder.launched(compiled, grid, (*arguments, *constants.values()))


def _kind_of(argument: Any) -> Any:
    """What Triton may compile into a kernel of an argument's value."""
    kind = type(argument)
    if kind is StridedRows:
        tensor, (batch, head, row) = argument
        if tensor is None:
            return None
        return _kind_of_tensor(tensor), _kind_of_int(batch), _kind_of_int(head), _kind_of_int(row)
    if kind is int:
        return _kind_of_int(argument)
    if kind is float or argument is None:
        return kind
    if kind is TileLists:
        strides = argument.sequence_stride, argument.head_stride, argument.num_tiles
        return tuple(map(_kind_of_int, strides))
    if kind is Partials:
        return tuple(map(_kind_of_tensor, argument))
    if isinstance(argument, Tensor):
        return _kind_of_tensor(argument)
    if kind is Dropout:
        return argument.threshold
    if hasattr(argument, "block_shape"):
        return kind  # a descriptor's type follows from the constants
    return argument


def _kind_of_int(value: int) -> int:
    """A one is a constant; of others Triton looks at divisibility by 16 and at the size. Strides grow with every key of a cache."""
    if value == 1:
        return 1
    return (2 if value % 16 else 3) if -MAX_INT32 <= value <= MAX_INT32 else -(value % 16 == 0)


def _kind_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    if not IS_HIP:
        return tensor.dtype, tensor.data_ptr() % 16
    # There, pointers into less than 2 GiB are compiled for that.
    is_small = tensor.untyped_storage().nbytes() <= MAX_INT32
    return tensor.dtype, tensor.data_ptr() % 16, is_small


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _sizes_and_index(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, direction: Direction
) -> tuple[TileSizes, BlockIndex]:
    """Tile sizes and the index for them, of strips where the index finds that those suit the layout."""
    facts = (
        *backend_of(query.device),
        direction,
        query.shape[-1],
        value.shape[-1],
        query.element_size(),
        problem.block_size,
    )
    sizes, gathered = tile_sizes(*facts), gathered_tile_sizes(*facts)
    if gathered is None:
        return sizes, problem.index_for(sizes.tile_q, sizes.tile_kv)
    per_query = 0 if direction == "grad_key_value" else FIXED_KEYS
    kind = Strips(*gathered.index_shape(direction), GATHERED_RATE, per_query=per_query)
    kinds = [(kind, gathered)]
    narrow = narrow_tile_sizes(*facts)
    if narrow is not None:
        rate = narrow_rate(direction, query.shape[-1], value.shape[-1], problem.block_size)
        kinds.append((Strips(*narrow.index_shape(direction), rate, per_query=per_query), narrow))
    group_size = query.shape[1] // key.shape[1]
    if direction != "grad_key_value" and group_size > 1:  # there the heads are walked one by one
        kinds.append((kind._replace(group_size=group_size), gathered))
    index = problem.index_for(sizes.tile_q, sizes.tile_kv, False, tuple(kind for kind, _ in kinds))
    return _kind_of_index(index, kinds) or sizes, index


def _kind_of_index(
    index: BlockIndex, kinds: Sequence[tuple[Strips, TileSizes]]
) -> TileSizes | None:
    """The sizes of the kind of strips that an index is of; None for whole tiles.

    Narrow tiles of one head and packed heads may have strips of one shape. The index was then chosen for the faster kind.
    """
    found = []
    for strips, sizes in kinds:
        shape = strips.shape(index.heads_per_list)
        if shape is not None and shape[:2] == (index.tile_q, index.tile_kv):
            found.append((strips.max_share / shape[2], sizes))
    return max(found, key=lambda each: each[0])[1] if found else None


class Packing(NamedTuple):
    """How the rows of a query tile are spread over heads: up to `members` of the `heads_per_list` that share a list and a key head."""

    members: int
    heads_per_list: int
    num_packs: int


def _packing(sizes: TileSizes, index: BlockIndex, heads: int, group_size: int) -> Packing:
    members = sizes.tile_q // index.tile_q
    if members == 1:
        return Packing(1, 1, heads)
    heads_per_list = math.gcd(group_size, index.heads_per_list)
    return Packing(members, heads_per_list, heads // heads_per_list * -(-heads_per_list // members))


def _constants(query: Tensor, value: Tensor, sizes: TileSizes | DecodeSizes) -> dict[str, Any]:
    precision = "ieee"
    # The property answers for torch's old and new ways of allowing TF32 alike.
    if query.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    return dict(
        HEAD_DIM=query.shape[-1],
        HEAD_DIM_PADDED=_padded(query.shape[-1]),
        VALUE_DIM=value.shape[-1],
        VALUE_DIM_PADDED=_padded(value.shape[-1]),
        TILE_Q=sizes.tile_q,
        TILE_KV=sizes.tile_kv,
        INPUT_PRECISION=precision,
    )


def _options(sizes: TileSizes | DecodeSizes) -> dict[str, Any]:
    return dict(num_warps=sizes.num_warps, num_stages=sizes.num_stages)


def _score_scales(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Factors after and before the tanh, in units of log2."""
    if softcap is None:
        return scale * LOG2_E, None
    return softcap * LOG2_E, scale / softcap


def _slopes(alibi_slopes: Tensor | None, score_scale: float) -> Tensor | None:
    """ALiBi slopes as the kernels subtract them, before they multiply by `score_scale`."""
    if alibi_slopes is None:
        return None
    return (alibi_slopes * (LOG2_E / score_scale)).contiguous()


def _dropout(problem: Problem) -> Dropout | None:
    if not problem.dropout_p:
        return None
    threshold = round(problem.dropout_p * 2**32)
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return Dropout(problem.dropout_seed, signed, 1.0 / (1.0 - problem.dropout_p))


def _rows(tensor: Tensor) -> StridedRows:
    """A tensor as a kernel argument."""
    return StridedRows(tensor, tensor.stride()[:3])


def _descriptor(tensor: Tensor, tile: int, strip: int = 0) -> TensorDescriptor | None:
    """A tensor descriptor of blocks of `tile` rows of one head, None where strips, hardware or alignment forbid it."""
    if strip:
        return None
    strides = descriptor_strides(
        *backend_of(tensor.device), tuple(tensor.shape), tensor.stride(), tensor.element_size()
    )
    if strides is None or tensor.data_ptr() % 16:
        return None
    return descriptor_of(TensorDescriptor, tensor, strides, (1, 1, tile, _padded(tensor.shape[-1])))


def descriptor_of(
    descriptor_class: type,
    tensor: Tensor,
    strides: tuple[int, ...],
    block: tuple[int, ...],
    layout: Any = None,
) -> Any:
    """`descriptor_class(tensor, shape, strides, block, layout)`, whose checks are made once for tensors that are alike.

    `tensor` is aligned; `layout`, where the class takes one, follows from class, block and dtype.
    """
    alike = (descriptor_class, tensor.shape, strides, block, tensor.dtype)
    checked = _checked_descriptors.get(alike)
    if checked is None:
        layouts = () if layout is None else (layout,)
        made = descriptor_class(tensor, list(tensor.shape), list(strides), list(block), *layouts)
        if len(_checked_descriptors) >= REMEMBERED_VARIANTS:
            _checked_descriptors.clear()
        _checked_descriptors[alike] = {k: v for k, v in vars(made).items() if k != "base"}
        return made
    descriptor = object.__new__(descriptor_class)
    vars(descriptor).update(checked, base=tensor)
    return descriptor


@lru_cache(maxsize=1024)
def descriptor_strides(
    backend: str, capability: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, ...] | None:
    """Strides, in elements, for a tensor descriptor; None where the device has no TMA, or it cannot address such a tensor."""
    if backend == "hip" or (backend == "cuda" and capability < 90):
        return None
    granule = 16 // itemsize
    # The stride of an axis of one element is never used, and may be anything.
    used = [
        stride if size > 1 else granule
        for size, stride in zip(shape[:-1], strides[:-1], strict=True)
    ]
    if any(stride % granule or stride <= 0 for stride in used):
        return None
    return *used, 1


def tile_lists(index: BlockIndex) -> tuple[TileLists, TileLists]:
    """The lists of the query tiles and those of the key tiles, as kernel arguments."""
    known = _lists_of.get(index)
    if known is None:
        sequence_stride, head_stride = (
            0 if size == 1 else stride
            for size, stride in zip(index.list_of.shape, index.list_of.stride(), strict=True)
        )

        def lists(
            offsets: Tensor, num_full: Tensor, indices: Tensor, mask_ids: Tensor
        ) -> TileLists:
            return TileLists(
                list_of=index.list_of,
                sequence_stride=sequence_stride,
                head_stride=head_stride,
                offsets=offsets,
                num_full=num_full,
                indices=indices,
                mask_ids=mask_ids,
                bank=index.bank,
                num_tiles=num_full.shape[1],
            )

        known = _lists_of[index] = (
            lists(index.kv_offsets, index.kv_num_full, index.kv_indices, index.kv_mask_ids),
            lists(index.q_offsets, index.q_num_full, index.q_indices, index.q_mask_ids),
        )
    return known
