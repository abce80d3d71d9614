"""The implementations that the benchmark compares, each as a function of query, key and value for one case.

Peers get exactly the mask that ours computes: their lists of tiles are read from our block index, at their own tile sizes, and partial
tiles by a function of positions in their own language.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark_cases import (
    Case,
    applies,
    exact_index,
    make_layout,
    random_layout,
    window_of_equal_tiles,
)
from torch import Tensor

from hf_blocksparse import Layout, block_sparse_attention
from hf_blocksparse.block_index import BlockIndex

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """One implementation on one case.

    Attributes:
        attend: query, key, value to the output.
        layout: what it computes; None: dense attention.
        tile: side of the tiles it was given lists for; None where it chooses its own.
        heads_outside: its tensors are `[batch, length, heads, head_dim]`.
    """

    attend: Attend
    layout: Layout | None
    tile: int | None = None
    heads_outside: bool = False


@dataclass(frozen=True)
class TileLists:
    """Tiles of each row (or, transposed, of each column), as FlexAttention and FlashAttention-4 want them.

    Counts are int32 `[1, heads or 1, lines]`, indices int32 `[1, heads or 1, lines, width]`, valid up to the count, ascending.
    """

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


def tile_lists(
    index: BlockIndex, *, transposed: bool = False, is_compact: bool = False
) -> TileLists:
    """From our index; as wide as the longest line if compact, else as the number of tiles of a line."""
    if transposed:
        offsets, num_full, indices = index.q_offsets, index.q_num_full, index.q_indices
        width = index.num_q_tiles
    else:
        offsets, num_full, indices = index.kv_offsets, index.kv_num_full, index.kv_indices
        width = index.num_kv_tiles
    num_partial = offsets.diff(dim=1) - num_full
    lists = index.list_of[0].long()
    parts = []
    for counts, first in ((num_partial, offsets[:, :-1] + num_full), (num_full, offsets[:, :-1])):
        columns = max(1, int(counts.max())) if is_compact else width
        place = torch.arange(columns, dtype=torch.int32, device=offsets.device)
        padded = torch.zeros(*counts.shape, columns, dtype=torch.int32, device=offsets.device)
        for number in range(counts.shape[0]):  # one list at a time: the temporaries are 64-bit
            valid = place < counts[number, :, None]
            padded[number][valid] = indices[(first[number, :, None] + place)[valid].long()]
        parts += [counts[lists][None].contiguous(), padded[lists][None].contiguous()]
    return TileLists(*parts)


def kept_blocks(case: Case, layout: Layout, device: torch.device) -> Tensor:
    """Which blocks a block-exact layout keeps at least in part: bool `[heads or 1, blocks, blocks]`."""
    index = exact_index(case, layout, case.block_size, device)
    counts = index.kv_offsets.diff(dim=1).flatten().long()
    line = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    matrix = torch.zeros(counts.numel(), index.num_kv_tiles, dtype=torch.bool, device=device)
    matrix[line, index.kv_indices.long()] = True
    return matrix.view(index.num_lists, -1, index.num_kv_tiles)[index.list_of[0].long()]


def needs_table(case: Case, tile: int) -> bool:
    """Whether some tiles of this size are kept in part because blocks are smaller."""
    return 1 < case.block_size < tile


def _window_terms(layout: Layout) -> tuple[int, int, int]:
    """`(before, sink, global)`: keys up to `before` positions back, the first `sink` keys, the first `global` tokens both ways."""
    kind = layout.to_dict()
    if kind["kind"] == "sliding_window":
        return kind["window"] - 1, 0, 0
    if kind["kind"] == "sink_window":
        return kind["window"] - 1, kind["sink"], 0
    assert kind["kind"] == "longformer", kind
    return kind["window"] // 2, 0, kind["global_tokens"]


def position_mask(case: Case, layout: Layout, tile: int, device: torch.device) -> Callable | None:
    """What is kept in partial tiles of this size, as a function of (batch, head, query, key); None: there are none.

    In tiles that are kept whole or not at all it may say anything.
    """
    if needs_table(case, tile):
        block, table = case.block_size, kept_blocks(case, layout, device)
        if table.shape[0] == 1:
            table = table.expand(case.heads, -1, -1)
        if case.is_causal:
            return lambda b, h, q, kv: table[h, q // block, kv // block] & (q >= kv)
        return lambda b, h, q, kv: table[h, q // block, kv // block]
    if case.layout == "causal" or (case.block_size > 1 and case.is_causal):
        return lambda b, h, q, kv: q >= kv
    if case.layout == "full" or case.block_size > 1:
        return None
    before, sink, both = _window_terms(layout)
    if case.layout == "longformer":
        return lambda b, h, q, kv: (
            ((q - kv <= before) & (kv - q <= before)) | (kv < both) | (q < both)
        )
    if sink:
        return lambda b, h, q, kv: (q >= kv) & ((q - kv <= before) | (kv < sink))
    return lambda b, h, q, kv: (q >= kv) & (q - kv <= before)


def ours(
    case: Case, device: torch.device, layout: Layout, implementation: str = "auto"
) -> Implementation:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(
            query, key, value, layout, is_causal=case.is_causal, impl=implementation
        )

    return Implementation(attend, layout)


def sdpa(case: Case, device: torch.device, *, is_cudnn: bool) -> Implementation:
    """Chooses the backend for the whole process: a context manager around each call would add to the time of issuing it."""
    torch.backends.cuda.enable_cudnn_sdp(is_cudnn)
    torch.backends.cuda.enable_flash_sdp(not is_cudnn)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    gqa = case.heads != case.kv_heads
    # One query, the last position, sees every key; SDPA's own causality would leave it the first alone.
    is_causal = case.is_causal and case.query_tokens is None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=gqa
        )

    return Implementation(attend, None)


def flex_block_mask(case: Case, layout: Layout, device: torch.device):
    """FlexAttention's block mask, from our index, because `create_block_mask` looks at every coefficient.

    Its blocks are as large as ours, at least 64. Indices are as wide as FlexAttention makes them, so that compiled (and autotuned)
    kernels serve every layout of a shape.
    """
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    tile = flex_tile(case)
    index = exact_index(case, layout, tile, device)
    rows, columns = tile_lists(index), tile_lists(index, transposed=True)
    mask = position_mask(case, layout, tile, device)
    return BlockMask(
        seq_lengths=(case.length_tokens, case.length_tokens),
        kv_num_blocks=rows.partial_counts,
        kv_indices=rows.partial_indices,
        full_kv_num_blocks=rows.full_counts,
        full_kv_indices=rows.full_indices,
        q_num_blocks=columns.partial_counts,
        q_indices=columns.partial_indices,
        full_q_num_blocks=columns.full_counts,
        full_q_indices=columns.full_indices,
        BLOCK_SIZE=(tile, tile),
        mask_mod=noop_mask if mask is None else mask,
    )


def flex_tile(case: Case) -> int:
    return 128 if case.block_size == 1 else max(64, case.block_size)


def flex(case: Case, device: torch.device, *, autotune: bool) -> Implementation:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    # The backward is run again and again on one forward.
    config.donated_buffer = False
    torch._dynamo.reset()
    layout = make_layout(case)
    block_mask = flex_block_mask(case, layout, device)
    mode = "max-autotune-no-cudagraphs" if autotune else None
    compiled = torch.compile(flex_attention, mode=mode, dynamic=False)
    gqa = case.heads != case.kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, block_mask=block_mask, enable_gqa=gqa)

    return Implementation(attend, layout, flex_tile(case))


def cute_mask(
    case: Case, layout: Layout, tile: int, device: torch.device
) -> tuple[Callable | None, list[Tensor] | None]:
    """`position_mask` for FlashAttention-4, and the tensors it reads."""
    import benchmark_cute_masks as masks

    if needs_table(case, tile):
        blocks = kept_blocks(case, layout, device).to(torch.int32)
        blocks = blocks.expand(case.heads, -1, -1).contiguous()
        make = masks.causal_table if case.is_causal else masks.table
        return make(case.block_size), [blocks]
    if case.block_size > 1:
        return (masks.causal if case.is_causal else None), None
    before, sink, both = _window_terms(layout)
    if case.layout == "longformer":
        return masks.longformer(before, both), None
    if sink:
        return masks.causal_sink_window(before, sink), None
    return masks.causal_window(before), None


def flash_attention_4(case: Case, device: torch.device, *, kind: str) -> Implementation:
    """FlashAttention-4 (flash_attn.cute): block-sparse from our index, dense, or with its own sliding window.

    Block-sparse tiles are 128 x 128, or 64 x 64 for smaller blocks, which its backward refuses on Hopper. Its tensors have heads outside
    of rows.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    layout, tile, options = make_layout(case), None, {}
    if kind == "dense":
        layout, options = None, {"causal": case.is_causal}
    elif kind == "window":
        before, _, _ = _window_terms(layout)
        options = {"window_size": (before, 0)}
    else:
        tile = 128 if case.block_size in (1, 128) else 64
        index = exact_index(case, layout, tile, device)
        for name, is_transposed in (
            ("block_sparse_tensors", False),
            ("block_sparse_tensors_bwd", True),
        ):
            lists = tile_lists(index, transposed=is_transposed, is_compact=True)
            options[name] = BlockSparseTensorsTorch(
                lists.partial_counts,
                lists.partial_indices,
                lists.full_counts,
                lists.full_indices,
                block_size=(tile, tile),
            )
        options["mask_mod"], options["aux_tensors"] = cute_mask(case, layout, tile, device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = flash_attn_func(query, key, value, **options)
        return out[0] if isinstance(out, tuple) else out

    return Implementation(attend, layout, tile, heads_outside=True)


def make_implementation(name: str, case: Case, device: torch.device) -> Implementation:
    """An implementation by its name in `benchmark_cases.IMPLEMENTATIONS`; what it cannot do raises, here or when called.

    `ours_portable` is ours with the kernels for any GPU, `ours_mha` ours with a key head for every query head (the caller changes the
    case), `ours_window` ours on a window with as many tiles per row as the case's layout, `ours_by_head` ours with a list for each head.
    """
    if case.query_tokens is not None and not applies(name, case):
        raise NotImplementedError(
            f"name got {name!r} for {case}; with query_tokens it must be one that benchmark_cases.applies names; leave it out."
        )
    if name in ("ours", "ours_mha"):
        return ours(case, device, make_layout(case))
    if name == "ours_portable":
        return ours(case, device, make_layout(case), "triton")
    if name == "ours_window":
        return ours(case, device, window_of_equal_tiles(case))
    if name == "ours_by_head":
        return ours(case, device, random_layout(case))
    if name in ("flex", "flex_autotune"):
        return flex(case, device, autotune=name == "flex_autotune")
    if name in ("sdpa_flash", "sdpa_cudnn"):
        return sdpa(case, device, is_cudnn=name == "sdpa_cudnn")
    kinds = {"fa4": "block-sparse", "fa4_dense": "dense", "fa4_window": "window"}
    if name in kinds:
        return flash_attention_4(case, device, kind=kinds[name])
    raise ValueError(f"name got {name!r}; it must be one of benchmark_cases.IMPLEMENTATIONS.")
