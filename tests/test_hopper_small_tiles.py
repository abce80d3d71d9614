"""The kernels for Hopper with tiles of 64, as `test_hopper_kernels.py` has those with tiles of 128, and which of them a layout takes."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from numerics import make_qkv
from test_hopper_kernels import (
    CASES,
    WALKED,
    Case,
    check,
    check_backward,
    on_hopper,
    problem_of,
    random_blocks,
    random_case,
    walk,
    without_gpu,
)

from hf_blocksparse import BigBird, Dense, Layout, TensorLayout
from hf_blocksparse.block_index import BlockIndex, get_index
from hf_blocksparse.ops import hopper
from hf_blocksparse.ops.problem import Problem
from hf_blocksparse.sequences import Sequences

TILE = hopper.SMALL_TILE


def crossing(heads: int, blocks: int, block: int) -> TensorLayout:
    """A diagonal, one row of all keys and one column of all queries."""
    kept = torch.eye(blocks, dtype=torch.bool)
    kept[blocks // 2] = True
    kept[:, 1] = True
    return TensorLayout.from_tensor(kept[None].repeat(heads, 1, 1), block)


SMALL_CASES = CASES | {
    "one tile": Case(Dense(), 64, is_causal=False),
    "two tiles": Case(Dense(), 128, is_causal=False),
    "three tiles": Case(Dense(), 192, is_causal=False),
    "three tiles, causal": Case(Dense(), 192),
    "a long column": Case(crossing(8, 40, 64), 2550, is_causal=False, heads=8, kv_heads=1),
    "a long column, head size 64": Case(
        crossing(8, 40, 64), 2550, is_causal=False, heads=8, kv_heads=2, head_dim=64
    ),
    "head size 72": Case(random_blocks(4, 1000, 64, 0.3, 5), head_dim=72),
    "scattered, heads outside rows": Case(
        random_blocks(4, 1000, 64, 0.3, 6), is_causal=False, batch=2, rows_outside_heads=False
    ),
}
IN_FLOAT16 = ("causal", "documents", "head size 64", "head size 96", "random blocks of 64")


@on_hopper
@pytest.mark.parametrize("name", SMALL_CASES)
def test_forward_matches_dense_attention(name):
    check(SMALL_CASES[name], TILE)


@on_hopper
@pytest.mark.parametrize("name", SMALL_CASES)
def test_backward_matches_dense_attention(name):
    check_backward(SMALL_CASES[name], tile=TILE)


@on_hopper
@pytest.mark.parametrize("name", IN_FLOAT16)
def test_float16_matches_dense_attention(name):
    case = replace(SMALL_CASES[name], dtype=torch.float16)
    check(case, TILE)
    check_backward(case, has_grad_lse=False, tile=TILE)


@on_hopper
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_forward_matches_dense_attention_at_random(seed):
    check(random_case(seed), TILE)


@on_hopper
@pytest.mark.parametrize("seed", range(1000, 1150))
def test_backward_matches_dense_attention_at_random(seed):
    check_backward(random_case(seed), has_grad_lse=seed % 2 == 0, tile=TILE)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["bigbird", "a long column"])
def test_results_are_bitwise_reproducible(name, head_dim):
    case = replace(SMALL_CASES[name], head_dim=head_dim)
    shape = (1, case.heads, case.kv_heads, case.query_len, case.query_len, head_dim, head_dim)
    query, key, value = make_qkv(*shape, dtype=torch.bfloat16, device="cuda")
    problem = problem_of(case, "cuda", TILE)
    grad_out = torch.randn_like(query)

    def results():
        out, lse = hopper.forward(query, key, value, problem, problem.scale)
        given = (grad_out, None, query, key, value, out, lse, problem, problem.scale)
        return out, lse, *hopper.backward(*given, (True,) * 3)

    first = results()
    for _ in range(20):
        assert all(map(torch.equal, first, results()))


@on_hopper
def test_only_needed_gradients_are_computed():
    case = SMALL_CASES["head size 64"]
    query, key, value = make_qkv(1, 4, 2, 1000, 1000, 64, 64, dtype=torch.bfloat16, device="cuda")
    problem = problem_of(case, "cuda", TILE)
    out, lse = hopper.forward(query, key, value, problem, problem.scale)
    grad_out = torch.randn_like(out)

    def grads(grad_out, needed):
        given = (query, key, value, out, lse, problem, problem.scale, needed)
        return hopper.backward(grad_out, None, *given)

    everything = grads(grad_out, (True, True, True))
    for number in range(3):
        needed = tuple(number == other for other in range(3))
        for grad, expected, flag in zip(grads(grad_out, needed), everything, needed, strict=True):
            assert torch.equal(grad, expected) if flag else grad is None
    assert all(grad.count_nonzero() == 0 for grad in grads(None, (True, True, True)))


@on_hopper
def test_deterministic_algorithms_take_these_kernels():
    """The operation itself: gradients of a layout of large blocks are then the same bits in every call."""
    from hf_blocksparse import block_sparse_attention

    shape = (1, 4, 2, 2048, 2048, 128, 128)
    leaves = [
        leaf.requires_grad_() for leaf in make_qkv(*shape, dtype=torch.bfloat16, device="cuda")
    ]
    grad_out = torch.randn_like(leaves[0])
    layout = random_blocks(4, 2048, 128, 0.4, 0)

    def grads():
        out = block_sparse_attention(*leaves, layout, is_causal=False)
        return torch.autograd.grad(out, leaves, grad_out)

    with deterministic_algorithms():
        first = grads()
        for _ in range(10):
            assert all(map(torch.equal, first, grads()))


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CHOICES = {
    "random 128": (random_blocks(4, 2048, 128, 0.25, 0), (128, 128)),
    "random 64": (random_blocks(4, 2048, 64, 0.25, 0), (64, 64)),
    "random 32": (random_blocks(4, 2048, 32, 0.05, 0), (64, 32)),
    "random 32, dense": (random_blocks(4, 2048, 32, 0.6, 0), (128, 128)),
    "random 16": (random_blocks(4, 2048, 16, 0.1, 0), (64, 16)),
    "bigbird 64": (BigBird(64), (64, 64)),
    "window 64": (
        BigBird(64, window_blocks=33, global_blocks=0, random_blocks=0),
        (128, 128),
    ),
    "window 16": (
        BigBird(16, window_blocks=129, global_blocks=0, random_blocks=0),
        (128, 128),
    ),
    "pairs of 32": (crossing(4, 32, 64), (64, 64)),
}


def problem_that_chooses(layout: Layout) -> tuple[Problem, list[BlockIndex]]:
    """With a real index for what is asked for; the list holds the answers."""
    where = Sequences.uniform(1, 2048, 2048, 0, torch.device("cpu"))
    given: list[BlockIndex] = []

    def index_for(tile_q, tile_kv, of_queries_alone=False, strips=None):
        index = get_index(
            layout,
            where,
            is_causal=True,
            attn_mask=None,
            num_heads=4,
            tile_q=tile_q,
            tile_kv=tile_kv,
            device=where.table.device,
            strips=strips,
        )
        given.append(index)
        return index

    return Problem(index_for, where, layout.grain, 1.0), given


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_small_blocks_take_the_tiles_that_compute_the_least(name, direction):
    layout, shape = CHOICES[name]
    problem, _ = problem_that_chooses(layout)
    index = hopper._index_of(problem, direction)
    assert (index.tile_q, index.tile_kv) == shape
    alone = problem.index_for(*shape)
    assert index is alone, "the portable kernels would hold another one"


@pytest.mark.parametrize("name", ["random 128", "window 64", "random 16"])
def test_deterministic_algorithms_have_a_backward_in_tiles_of_64(name):
    layout, shape = CHOICES[name]
    problem, _ = problem_that_chooses(layout)
    with deterministic_algorithms():
        forward = hopper._index_of(problem, "forward")
        backward = hopper._index_of(problem, "backward")
    assert (forward.tile_q, forward.tile_kv) == shape
    assert (backward.tile_q, backward.tile_kv) == ((64, 16) if name == "random 16" else (64, 64))


SMALL_WALKED = (*WALKED, "three tiles, causal", "a long column")


@without_gpu
@pytest.mark.parametrize("name", SMALL_WALKED)
def test_work_lists_hold_every_tile_once(name):
    case = SMALL_CASES[name]
    assert torch.equal(walk(case, 5, TILE), case.mask())


def walk_parts(case: Case, num_programs: int) -> torch.Tensor:
    """The mask that the key pass's records add up to; every key row must be there once per part and every step valid."""
    from hf_blocksparse.ops.hopper.work import make_part_schedule

    group = case.heads // case.kv_heads
    sequences = case.sequences("cpu")
    index = case.index(sequences, TILE)
    schedule = make_part_schedule(index, sequences, case.heads, case.kv_heads, num_programs)
    bits = index.bank_bits()
    indices, mask_ids = index.q_indices.tolist(), index.q_mask_ids.tolist()
    mask = torch.zeros(case.batch, case.heads, case.query_len, case.keys, dtype=torch.bool)
    seen = torch.zeros(case.batch, case.kv_heads, case.keys, dtype=torch.int32)
    divided = {}
    for batch, head, row, begin, end, slot, count in schedule.divided.tolist():
        if count:
            assert count > 1 and 0 <= slot <= slot + count <= schedule.num_slots
            for number in range(count):
                assert slot + number not in divided, "two tiles share a slot"
                divided[slot + number] = (batch, head, row, begin, end, number)
    bounds = schedule.offsets.tolist()
    assert bounds == sorted(bounds) and bounds[0] == 0
    sizes = []
    for members in schedule.records[: bounds[-1]].tolist():
        slot = members[0][19]
        sizes.append(sum(record[18] - record[17] for record in members))
        assert sizes[-1] >= 1
        for member, record in enumerate(members):
            batch, head, kv_row, kv_begin, kv_end, shift, q_begin, q_end, _ = record[:9]
            partial, num_partial, full, starts, num_edges, num_masked, num_tiles, of_part = record[
                9:17
            ]
            first, last = record[17:19]
            assert of_part == sizes[-1] and record[19] == slot
            assert head % group == member and 0 <= first <= last <= num_tiles
            rows = torch.arange(kv_row, kv_row + TILE)
            own = (rows >= kv_begin) & (rows < kv_end)
            if member == 0 and slot >= 0:
                *where, number = divided.pop(slot)
                assert where == [batch, head // group, kv_row, kv_begin, kv_end]
            if member == 0 and (slot < 0 or number == 0):
                seen[batch, head // group, rows[own]] += 1
            for step in range(first, last):
                if step < num_partial:
                    entry = partial + step
                elif step < num_partial + num_edges:
                    full_end = full + num_tiles - num_partial - num_edges
                    entry = full - 1 if step - num_partial < starts else full_end
                else:
                    entry = full + step - num_partial - num_edges
                number_of_tile, mask_id = indices[entry], mask_ids[entry]
                columns = torch.arange(TILE) + number_of_tile * TILE + shift
                inside = (columns >= q_begin) & (columns < q_end)
                if q_begin == q_end:
                    assert num_masked == 1
                    continue
                assert inside.any()
                if step >= num_masked:
                    assert mask_id == -1 and inside.all() and own.all()
                kept = torch.ones(TILE, TILE, dtype=torch.bool) if mask_id < 0 else bits[mask_id]
                place = mask[batch, head, columns[inside][:, None], rows[own]]
                assert not (place & kept[inside][:, own]).any(), "a tile is walked twice"
                mask[batch, head, columns[inside][:, None], rows[own]] |= kept[inside][:, own]
    assert not divided, "parts that nobody computes"
    expected = torch.zeros_like(seen)
    for batch, _, _, _, kv_row, kv_len, _ in sequences.table.tolist():
        expected[batch, :, kv_row : kv_row + kv_len] = 1
    assert torch.equal(seen, expected)
    longest = max(-(-sum(sizes) // num_programs), 16)
    assert max(sizes) <= longest
    return mask


@without_gpu
@pytest.mark.parametrize("name", SMALL_WALKED)
@pytest.mark.parametrize("num_programs", [3, 40])
def test_parts_of_key_tiles_hold_every_tile_once(name, num_programs):
    case = SMALL_CASES[name]
    assert torch.equal(walk_parts(case, num_programs), case.mask())


@without_gpu
@pytest.mark.parametrize("seed", range(6))
def test_parts_of_key_tiles_hold_every_tile_once_at_random(seed):
    case = random_case(seed)
    if case.index(case.sequences("cpu"), TILE).num_tiles:
        assert torch.equal(walk_parts(case, 7), case.mask())


@without_gpu
@pytest.mark.parametrize("head_dim", [40, 96])
def test_parts_are_added_in_their_order(head_dim):
    from hf_blocksparse.ops.hopper.two_pass_kernels import add_parts_kernel
    from hf_blocksparse.ops.triton.tiles import StridedRows

    dim = 64 if head_dim <= 64 else 128
    sums = torch.randn(5, 2, TILE, dim, generator=torch.Generator().manual_seed(0))
    # Batch row, key head, first row, begin and end of the sequence, first slot, parts.
    divided = torch.tensor(
        [[1, 0, -10, 0, 90, 0, 2], [0, 1, 70, 0, 100, 2, 3], [0, 0, 0, 0, 0, 0, 0]],
        dtype=torch.int32,
    )
    grads = [torch.full((2, 2, 100, head_dim), 7.0) for _ in range(2)]
    grad_key, grad_value = (StridedRows(grad, grad.stride()[:3]) for grad in grads)
    add_parts_kernel[(3, 2)](sums, divided, grad_key, grad_value, 0.5, HEAD_DIM=head_dim, DIM=dim)
    for number, (grad, scale) in enumerate(zip(grads, (0.5, 1.0), strict=True)):
        expected = torch.full_like(grad, 7.0)
        total = (sums[0, number] + sums[1, number]) * scale
        expected[1, 0, :54] = total[10:, :head_dim]
        total = (sums[2, number] + sums[3, number] + sums[4, number]) * scale
        expected[0, 1, 70:] = total[:30, :head_dim]
        assert torch.equal(grad, expected)
