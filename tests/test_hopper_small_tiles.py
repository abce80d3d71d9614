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
    walk_columns,
    without_gpu,
)

from hf_blocksparse import BigBird, Dense, Layout, SlidingWindow, TensorLayout
from hf_blocksparse.block_index import get_index
from hf_blocksparse.ops import hopper
from hf_blocksparse.ops.problem import Problem
from hf_blocksparse.ops.triton import launch
from hf_blocksparse.sequences import Sequences

TILE, STRIP = hopper.SMALL_TILE, hopper.STRIP


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
STRIP_CASES = SMALL_CASES | {
    f"{count} strips": Case(Dense(), 32 * count, is_causal=False) for count in (1, 3, 4, 5)
}
STRIP_CASES |= {
    "scattered blocks of 32": Case(random_blocks(4, 1000, 32, 0.2, 7), is_causal=False),
    "scattered blocks of 32, causal, head size 64": Case(
        random_blocks(4, 1000, 32, 0.2, 8), head_dim=64
    ),
    "scattered blocks of 16": Case(random_blocks(4, 1000, 16, 0.1, 9), is_causal=False),
}
IN_FLOAT16 = ("causal", "documents", "head size 64", "head size 96", "random blocks of 64")


@on_hopper
@pytest.mark.parametrize("name", SMALL_CASES)
def test_forward_matches_dense_attention(name):
    check(SMALL_CASES[name], TILE)


@on_hopper
@pytest.mark.parametrize("name", STRIP_CASES)
def test_forward_of_strips_matches_dense_attention(name):
    check(STRIP_CASES[name], TILE, STRIP)


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
    check(case, TILE, STRIP)


@on_hopper
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_forward_matches_dense_attention_at_random(seed):
    check(random_case(seed), TILE)


@on_hopper
@pytest.mark.parametrize("seed", range(1200, 1300))
def test_forward_of_strips_matches_dense_attention_at_random(seed):
    check(random_case(seed), TILE, STRIP)


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


WHOLE = (128, 128)
CHOICES = {  # at head size 128: tiles forward, and backward
    "causal": (Dense(), WHOLE, WHOLE),
    "narrow window": (SlidingWindow(128), (64, 64), (64, 64)),
    "wide window": (SlidingWindow(700), WHOLE, WHOLE),
    "random 128": (random_blocks(4, 2048, 128, 0.25, 0), WHOLE, WHOLE),
    "random 64": (random_blocks(4, 2048, 64, 0.25, 0), (64, 64), (64, 64)),
    "random 32": (random_blocks(4, 2048, 32, 0.1, 0), (64, 32), (64, 64)),
    "random 32, dense": (random_blocks(4, 2048, 32, 0.5, 0), (64, 32), WHOLE),
    "random 16": (random_blocks(4, 2048, 16, 0.1, 0), (64, 16), (64, 16)),
    "random 16, dense": (random_blocks(4, 2048, 16, 0.4, 0), WHOLE, WHOLE),
    "bigbird 64": (BigBird(64), (64, 64), (64, 64)),
    "bigbird 32": (BigBird(32), (64, 32), (64, 64)),
    "bigbird 16": (BigBird(16), (64, 16), (64, 16)),
    "bigbird 16, many random": (BigBird(16, random_blocks=32), WHOLE, WHOLE),
    "window 64": (BigBird(64, window_blocks=33, global_blocks=0, random_blocks=0), WHOLE, WHOLE),
    "window 32": (BigBird(32, window_blocks=65, global_blocks=0, random_blocks=0), WHOLE, WHOLE),
    "window 16": (BigBird(16, window_blocks=129, global_blocks=0, random_blocks=0), WHOLE, WHOLE),
    "pairs of 32": (crossing(4, 32, 64), (64, 64), (64, 64)),
}


def problem_that_chooses(layout: Layout) -> Problem:
    where = Sequences.uniform(1, 2048, 2048, 0, torch.device("cpu"))

    def index_for(tile_q, tile_kv, of_queries_alone=False, strips=()):
        return get_index(
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

    return Problem(index_for, where, layout.grain, 1.0)


@pytest.mark.parametrize("name", CHOICES)
def test_layouts_take_the_tiles_that_are_fastest(name):
    layout, *shapes = CHOICES[name]
    problem = problem_that_chooses(layout)
    choices = (hopper._index_of_forward, hopper._index_of_backward)
    for choose, shape in zip(choices, shapes, strict=True):
        index = choose(problem, 128, 1)
        assert (index.tile_q, index.tile_kv) == shape
        assert index is problem.index_for(*shape), "the portable kernels would hold another one"


def test_scattered_blocks_take_narrow_tiles_at_head_size_64():
    problem = problem_that_chooses(CHOICES["random 16"][0])
    forward = hopper._index_of_forward(problem, 64, 1)
    assert (forward.tile_q, forward.tile_kv) == (16, 16)
    assert hopper._index_of_backward(problem, 64, 1) is forward
    assert not hopper._is_of_these_kernels(forward, hopper.STRIP)


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CHOICES)
def test_strips_are_those_that_the_portable_kernels_choose(name, head_dim, group_size, monkeypatch):
    """Where these kernels leave a call to the portable ones, the index that said so is the one that those take."""
    monkeypatch.setattr(launch, "backend_of", lambda device: ("cuda", 90))
    problem = problem_that_chooses(CHOICES[name][0])
    query, key = (
        torch.empty(1, heads, 2048, head_dim, dtype=torch.bfloat16, device="meta")
        for heads in (4, 4 // group_size)
    )

    def takes(direction):
        return launch._sizes_and_index(query, key, key, problem, direction)[1]

    forward = hopper._index_of_forward(problem, head_dim, group_size)
    if not hopper._is_of_these_kernels(forward, hopper.STRIP):
        assert takes("forward") is forward
    backward = hopper._index_of_backward(problem, head_dim, group_size)
    if not hopper._is_of_these_kernels(backward, hopper.SMALL_TILE):
        assert takes("grad_query") is backward


@pytest.mark.parametrize(
    "density, forward, backward",
    [
        (0.1, (16, 16), (16, 16)),
        (0.4, (16, 16), (128, 128)),
        (0.9, (128, 128), (128, 128)),
    ],
)
def test_scattered_blocks_that_a_group_shares_are_packed(density, forward, backward):
    """Up to a density of their own for each direction."""
    problem = problem_that_chooses(random_blocks(1, 2048, 16, density, 0))
    chosen = (
        hopper._index_of_forward(problem, 128, 4),
        hopper._index_of_backward(problem, 128, 4),
    )
    assert [(index.tile_q, index.tile_kv) for index in chosen] == [forward, backward]
    for index in chosen:
        is_own = hopper._is_of_these_kernels(index, hopper.STRIP)
        assert is_own == (index.tile_q == 128)


def test_heads_with_lists_of_their_own_are_not_taken_for_packed():
    """What they keep is 0.4 of the tiles of 128, too much for strips of one head and not too much for packed ones."""
    problem = problem_that_chooses(CHOICES["random 16, dense"][0])
    index = hopper._index_of_forward(problem, 128, 4)
    assert (index.tile_q, index.tile_kv) == (128, 128)


@pytest.mark.parametrize("name", ["random 128", "window 64", "random 16"])
def test_deterministic_algorithms_have_a_backward_in_tiles_of_64(name):
    layout, shape, _ = CHOICES[name]
    problem = problem_that_chooses(layout)
    with deterministic_algorithms():
        forward = hopper._index_of_forward(problem, 128, 1)
        backward = hopper._index_of_backward(problem, 128, 1)
    assert (forward.tile_q, forward.tile_kv) == shape
    assert (backward.tile_q, backward.tile_kv) == ((64, 16) if name == "random 16" else (64, 64))


SMALL_WALKED = (*WALKED, "three tiles, causal", "a long column")


@without_gpu
@pytest.mark.parametrize("name", SMALL_WALKED)
def test_work_lists_hold_every_tile_once(name):
    case = SMALL_CASES[name]
    assert torch.equal(walk(case, 5, TILE), case.mask())


@without_gpu
@pytest.mark.parametrize("name", SMALL_WALKED)
def test_work_lists_hold_every_strip_once(name):
    case = SMALL_CASES[name]
    assert torch.equal(walk(case, 5, TILE, STRIP), case.mask())


@without_gpu
def test_rows_that_keep_whole_strips_are_known():
    from hf_blocksparse.ops.hopper.work import rows_kept

    scattered = STRIP_CASES["scattered blocks of 32"]
    causal = replace(scattered, is_causal=True)
    for case in (scattered, causal):
        index = case.index(case.sequences("cpu"), TILE, STRIP)
        masks, known = index.bank_bits(), rows_kept(index)
        assert rows_kept(index) is known
        for mask, bits in zip(masks, known.tolist(), strict=True):
            groups = mask.view(4, 16 * STRIP)
            if bits < 16:
                kept = torch.tensor([bool(bits >> group & 1) for group in range(4)])
                assert torch.equal(groups, kept[:, None].expand_as(groups))
            else:
                assert (groups != groups[:, :1]).any()
        assert {bits < 16 for bits in known.tolist()} == (
            {True, False} if case is causal else {True}
        )


@without_gpu
@pytest.mark.parametrize("name", SMALL_WALKED)
def test_work_lists_of_key_tiles_hold_every_tile_once(name):
    case = SMALL_CASES[name]
    assert torch.equal(walk_columns(case, 7, TILE), case.mask())


@without_gpu
@pytest.mark.parametrize("seed", range(4))
def test_work_lists_of_key_tiles_hold_every_tile_once_at_random(seed):
    case = random_case(seed)
    if case.index(case.sequences("cpu"), TILE).num_tiles:
        assert torch.equal(walk_columns(case, 40, TILE), case.mask())
