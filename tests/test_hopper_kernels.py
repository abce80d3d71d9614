"""The kernels for Hopper against dense attention in float64, on such a GPU (`-m gpu`), and their work lists anywhere.

One case: `pytest -m gpu tests/test_hopper_kernels.py -k "documents"`. There is no interpreter for Gluon: what the kernel does with a work
list is checked on a GPU alone.
"""

import math
import random
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import pytest
import torch
from numerics import (
    Inputs,
    Results,
    assert_close_to_reference,
    dense_attention,
    make_qkv,
    torch_attention,
)

from hf_blocksparse import BigBird, Dense, Layout, PerHead, SinkWindow, SlidingWindow, TensorLayout
from hf_blocksparse.block_index import BlockIndex, get_index
from hf_blocksparse.ops import hopper
from hf_blocksparse.ops.hopper import work
from hf_blocksparse.ops.problem import Problem
from hf_blocksparse.ops.triton import column_parts, launch
from hf_blocksparse.sequences import Sequences

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="its kernels are interpreted, where there is no GPU"
)


def on_hopper(test):
    """Marks a test of kernels that run on such a GPU alone."""
    test = pytest.mark.usefixtures("poisoned_memory")(test)
    test = pytest.mark.skipif(not HAS_HOPPER, reason="needs compute capability 9.0")(test)
    return pytest.mark.gpu(test)


@dataclass(frozen=True)
class Case:
    """One call. `table`: rows of `Sequences.table`, where the sequences are not whole batch rows."""

    layout: Layout
    query_len: int = 1000
    kv_len: int | None = None
    is_causal: bool = True
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    scale: float | None = None
    rows_outside_heads: bool = True
    table: tuple[tuple[int, ...], ...] | None = None

    @property
    def keys(self) -> int:
        return self.kv_len or self.query_len

    def sequences(self, device: str) -> Sequences:
        if self.table is None:
            start = self.keys - self.query_len
            return Sequences.uniform(
                self.batch, self.query_len, self.keys, start, torch.device(device)
            )
        return Sequences(
            torch.tensor(self.table, dtype=torch.int32, device=device),
            batch=self.batch,
            query_len=self.query_len,
            kv_len=self.keys,
            query_end=max(row[3] + row[2] for row in self.table),
            key_end=max(row[6] + row[5] for row in self.table),
            covers_queries=False,
            covers_keys=False,
        )

    def index(
        self, sequences: Sequences, tile: int = hopper.TILE, strip: int | None = None
    ) -> BlockIndex:
        return get_index(
            self.layout,
            sequences,
            is_causal=self.is_causal,
            attn_mask=None,
            num_heads=self.heads,
            tile_q=tile,
            tile_kv=strip or tile,
            device=sequences.table.device,
        )

    def mask(self) -> torch.Tensor:
        """Every coefficient that is kept, bool [batch, heads, query_len, kv_len]."""
        mask = torch.zeros(self.batch, self.heads, self.query_len, self.keys, dtype=torch.bool)
        for batch, q_row, q_len, q_pos, kv_row, kv_len, kv_pos in self.sequences(
            "cpu"
        ).table.tolist():
            length = max(q_pos + q_len, kv_pos + kv_len)
            part = self.layout.to_mask(length, is_causal=self.is_causal, num_heads=self.heads)
            part = part.expand(self.heads, length, length)
            mask[batch, :, q_row : q_row + q_len, kv_row : kv_row + kv_len] = part[
                :, q_pos : q_pos + q_len, kv_pos : kv_pos + kv_len
            ]
        return mask


def random_blocks(heads: int, length: int, block: int, density: float, seed: int) -> TensorLayout:
    blocks = -(-length // block)
    generator = torch.Generator().manual_seed(seed)
    return TensorLayout.from_tensor(
        torch.rand(heads, blocks, blocks, generator=generator) < density, block
    )


DOCUMENTS = tuple(
    (0, start, length, 0, start, length, 0)
    for start, length in ((0, 3), (3, 300), (303, 1), (304, 256), (570, 128), (700, 290))
)
RANDOM = random_blocks(4, 1000, 128, 0.4, 0)
CASES = {
    "one token": Case(Dense(), 1),
    "63 tokens": Case(Dense(), 63),
    "128 tokens, one head": Case(Dense(), 128, heads=1, kv_heads=1),
    "full": Case(Dense(), is_causal=False),
    "full, one batch row after the other": Case(Dense(), 512, is_causal=False, batch=3),
    "causal": Case(Dense()),
    "causal, 4096 tokens": Case(Dense(), 4096),
    "window": Case(SlidingWindow(200)),
    "window of whole tiles": Case(SlidingWindow(256), 1024, is_causal=False),
    "sink and window": Case(SinkWindow(4, 300), batch=2),
    "bigbird": Case(BigBird(64), 2048),
    "bigbird, both directions": Case(BigBird(128), 2000, is_causal=False),
    "random blocks of 128": Case(RANDOM, is_causal=False),
    "random blocks of 128, causal": Case(RANDOM),
    "random blocks of 64": Case(random_blocks(4, 1000, 64, 0.2, 1), is_causal=False),
    "random blocks of 32": Case(random_blocks(4, 1000, 32, 0.1, 2), is_causal=False),
    "random blocks of 16, rows without keys": Case(
        random_blocks(4, 1000, 16, 0.01, 3), is_causal=False
    ),
    "no key at all": Case(random_blocks(4, 300, 64, 0.0, 4), 300, is_causal=False),
    "another layout per head": Case(
        PerHead((Dense(), SlidingWindow(100), SinkWindow(8, 64), BigBird(64)))
    ),
    "queries at the end": Case(SlidingWindow(500), 200, 1000),
    "one query": Case(Dense(), 1, 900, batch=2, heads=8, kv_heads=1),
    "more queries than keys": Case(
        Dense(), 500, 200, is_causal=False, table=((0, 0, 500, 0, 0, 200, 0),)
    ),
    "head size 64": Case(BigBird(64), head_dim=64),
    "head size 96": Case(SinkWindow(4, 300), head_dim=96),
    "head size 40": Case(SlidingWindow(200), 300, head_dim=40),
    "heads outside rows": Case(SlidingWindow(200), batch=2, rows_outside_heads=False),
    "scale": Case(SlidingWindow(200), 300, scale=2.0),
    "documents": Case(Dense(), table=DOCUMENTS),
    "documents, both directions": Case(Dense(), is_causal=False, table=DOCUMENTS, head_dim=64),
    "documents of a window": Case(SlidingWindow(150), table=DOCUMENTS, head_dim=96),
    "padding": Case(
        Dense(),
        700,
        batch=4,
        table=(
            (0, 150, 550, 0, 150, 550, 0),
            (1, 0, 333, 0, 0, 333, 0),
            (2, 0, 0, 0, 0, 0, 0),
            (3, 256, 128, 0, 256, 128, 0),
        ),
    ),
    "tiles that start before the sequence": Case(
        SinkWindow(130, 200),
        500,
        batch=2,
        table=((0, 20, 400, 200, 60, 440, 160), (1, 100, 300, 77, 3, 370, 10)),
    ),
    "a cache that dropped old keys": Case(
        SlidingWindow(300), 130, 430, table=((0, 0, 130, 1000, 0, 430, 700),)
    ),
}
WALKED = (
    "one token",
    "full",
    "sink and window",
    "random blocks of 16, rows without keys",
    "another layout per head",
    "one query",
    "documents",
    "padding",
    "tiles that start before the sequence",
    "a cache that dropped old keys",
)


def problem_of(
    case: Case, device: str, tile: int = hopper.TILE, strip: int | None = None
) -> Problem:
    sequences = case.sequences(device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return Problem(
        lambda *_: case.index(sequences, tile, strip), sequences, case.layout.grain, scale
    )


def check(case: Case, tile: int = hopper.TILE, strip: int | None = None) -> None:
    """Rows that belong to no sequence hold NaN, which must not show anywhere."""
    query, key, value = make_qkv(
        case.batch,
        case.heads,
        case.kv_heads,
        case.query_len,
        case.keys,
        case.head_dim,
        case.head_dim,
        dtype=case.dtype,
        device="cuda",
        rows_outside_heads=case.rows_outside_heads,
    )
    mask = case.mask().cuda()
    options = dict(scale=case.scale)
    exact = dense_attention(query.double(), key.double(), value.double(), mask, **options)
    other = torch_attention(query, key, value, mask, **options)
    problem = problem_of(case, "cuda", tile, strip)
    hide_foreign_rows(case, problem, [query], [key, value])
    assert hopper.unsupported_forward(query, key, value, None, problem) == ()
    out, lse = hopper.forward(query, key, value, problem, problem.scale)
    assert (out.stride(1) < out.stride(2)) == (query.stride(1) < query.stride(2))
    assert_close_to_reference(
        Results(out, lse, None, None, None),
        Results(*exact, None, None, None),
        Results(other[0], None, None, None, None),
    )


def hide_foreign_rows(case: Case, problem: Problem, of_queries, of_keys) -> None:
    """NaN in the rows of those tensors that belong to no sequence."""
    no_query = torch.ones(case.batch, 1, case.query_len, dtype=torch.bool, device="cuda")
    no_key = torch.ones(case.batch, 1, case.keys, dtype=torch.bool, device="cuda")
    for batch, q_row, q_len, _, kv_row, kv_len, _ in problem.sequences.table.tolist():
        no_query[batch, :, q_row : q_row + q_len] = False
        no_key[batch, :, kv_row : kv_row + kv_len] = False
    for tensors, is_foreign in ((of_queries, no_query), (of_keys, no_key)):
        for tensor in tensors:
            tensor.masked_fill_(
                is_foreign if tensor.dim() == 3 else is_foreign[..., None], math.nan
            )


@on_hopper
@pytest.mark.parametrize("name", CASES)
def test_forward_matches_dense_attention(name):
    check(CASES[name])


@on_hopper
@pytest.mark.parametrize("name", ["causal", "documents", "head size 64", "head size 96"])
def test_forward_matches_dense_attention_in_float16(name):
    check(replace(CASES[name], dtype=torch.float16))


def check_backward(case: Case, has_grad_lse: bool = True, tile: int = hopper.TILE) -> None:
    """As `check`; output and LSE are the exact ones, rounded, so that no other kernel takes part."""
    query, key, value = make_qkv(
        case.batch,
        case.heads,
        case.kv_heads,
        case.query_len,
        case.keys,
        case.head_dim,
        case.head_dim,
        dtype=case.dtype,
        device="cuda",
        rows_outside_heads=case.rows_outside_heads,
    )
    mask = case.mask().cuda()
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.empty_like(query).copy_(torch.randn(query.shape, generator=generator))
    grad_lse = None
    if has_grad_lse:
        grad_lse = torch.randn(query.shape[:3], generator=generator).cuda()
    inputs = Inputs(query, key, value, grad_out, grad_lse)

    def attend_by(attention):
        return lambda query, key, value, _: attention(query, key, value, mask, scale=case.scale)

    exact = inputs.to(torch.float64).results(attend_by(dense_attention))
    # torch's attention knows no LSE: it is asked where nothing flows back from there.
    other = inputs.results(attend_by(dense_attention if has_grad_lse else torch_attention))
    out = torch.empty_like(query).copy_(exact.out)
    lse = exact.lse.float()
    problem = problem_of(case, "cuda", tile)
    of_queries = [query, grad_out] if grad_lse is None else [query, grad_out, grad_lse]
    hide_foreign_rows(case, problem, of_queries, [key, value])
    assert hopper.unsupported_backward(query, key, value, None, problem) == ()
    grads = hopper.backward(
        grad_out, grad_lse, query, key, value, out, lse, problem, problem.scale, (True,) * 3
    )
    for grad, tensor in zip(grads, (query, key, value), strict=True):
        assert (grad.stride(1) < grad.stride(2)) == (tensor.stride(1) < tensor.stride(2))
    assert_close_to_reference(
        Results(None, lse, *grads),
        Results(None, exact.lse, exact.grad_query, exact.grad_key, exact.grad_value),
        Results(None, None, other.grad_query, other.grad_key, other.grad_value),
    )


@on_hopper
@pytest.mark.parametrize("name", CASES)
def test_backward_matches_dense_attention(name):
    check_backward(CASES[name])


@on_hopper
@pytest.mark.parametrize("name", ["causal", "documents", "head size 64", "head size 96"])
def test_backward_matches_dense_attention_in_float16(name):
    check_backward(replace(CASES[name], dtype=torch.float16), has_grad_lse=False)


@on_hopper
@pytest.mark.parametrize("seed", range(150))
def test_backward_matches_dense_attention_at_random(seed):
    check_backward(random_case(seed), has_grad_lse=seed % 2 == 0)


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_key_and_value_are_bitwise_reproducible(head_dim):
    check_reproducible(replace(CASES["bigbird"], head_dim=head_dim))


def check_reproducible(case: Case) -> None:
    """The gradients of key and value, bit for bit."""
    query, key, value = make_qkv(
        case.batch,
        case.heads,
        case.kv_heads,
        case.query_len,
        case.keys,
        case.head_dim,
        case.head_dim,
        dtype=case.dtype,
        device="cuda",
    )
    problem = problem_of(case, "cuda")
    out, lse = hopper.forward(query, key, value, problem, problem.scale)
    given = (torch.randn_like(query), None, query, key, value, out, lse, problem, problem.scale)
    _, *first = hopper.backward(*given, (True,) * 3)
    for _ in range(20):
        _, *again = hopper.backward(*given, (True,) * 3)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


IN_PARTS = (
    "full",
    "causal",
    "bigbird",
    "bigbird, both directions",
    "random blocks of 16, rows without keys",
    "another layout per head",
    "head size 64",
    "head size 96",
    "documents",
    "documents, both directions",
    "padding",
    "tiles that start before the sequence",
    "a cache that dropped old keys",
)


@pytest.fixture(params=[1, 3])
def short_parts(request, monkeypatch):
    """Parts have so many steps at least. How often the sums of parts were added up."""
    added = []

    def add_parts(*arguments):
        added.append(arguments)
        launch_add_parts(*arguments)

    launch_add_parts = launch.launch_add_parts
    monkeypatch.setattr(launch, "launch_add_parts", add_parts)
    monkeypatch.setattr(column_parts, "SHORTEST_PART", request.param)
    monkeypatch.setattr(column_parts, "SHORT", 2)
    monkeypatch.setattr(work, "_column_schedules", WeakKeyDictionary())  # none of longer parts
    return added


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_backward_in_parts_matches_dense_attention(name, dtype, short_parts):
    case = replace(CASES[name], dtype=dtype)
    check_backward(case, has_grad_lse=dtype == torch.bfloat16)
    # With a part of one step every column of three and more is split.
    assert short_parts or column_parts.SHORTEST_PART > 1


@on_hopper
@pytest.mark.parametrize("seed", range(16))
def test_backward_in_parts_matches_dense_attention_at_random(seed, short_parts):
    check_backward(random_case(seed), has_grad_lse=seed % 2 == 0)


@on_hopper
def test_gradients_in_parts_are_bitwise_reproducible(short_parts):
    check_reproducible(replace(CASES["bigbird"], kv_heads=1))
    assert short_parts


@on_hopper
def test_backward_takes_any_gradient_and_gives_what_is_needed():
    """No gradient of the output, a constant without memory of its own, one whose last axis is not the fastest, one at an odd address."""
    case = CASES["head size 64"]
    query, key, value = make_qkv(1, 4, 2, 1000, 1000, 64, 64, dtype=torch.bfloat16, device="cuda")
    problem = problem_of(case, "cuda")
    out, lse = hopper.forward(query, key, value, problem, problem.scale)

    def grads(grad_out, needed=(True, True, True)):
        given = (query, key, value, out, lse, problem, problem.scale, needed)
        return hopper.backward(grad_out, None, *given)

    constant = grads(torch.ones_like(out))
    transposed = torch.ones_like(out).mT.contiguous().mT
    misaligned = out.new_ones(out.numel() + 1)[1:].view(out.shape)
    for other in map(grads, (out.new_ones(1).expand_as(out), transposed, misaligned)):
        assert torch.equal(other[1], constant[1]) and torch.equal(other[2], constant[2])
    assert all(grad.count_nonzero() == 0 for grad in grads(None))
    assert grads(None, (False, True, False))[0] is grads(None, (False, True, False))[2] is None
    assert grads(None, (False, False, False)) == (None, None, None)


def random_case(seed: int) -> Case:
    """Any layout, lengths, heads and sequences."""
    choose = random.Random(seed)
    query_len = choose.choice([1, 63, 64, 127, 128, 129, 200, 257, 500, 777, 1300])
    heads, kv_heads = choose.choice([(1, 1), (2, 1), (4, 2), (6, 2), (8, 8)])
    batch = choose.randint(1, 3)
    table = None
    if choose.random() < 0.6:
        table = []
        for row in range(batch):
            cuts = sorted(
                choose.sample(range(query_len + 1), min(choose.randint(2, 6), query_len + 1))
            )
            for start, end in zip(cuts[:-1], cuts[1:], strict=True):
                if choose.random() < 0.8:
                    first = choose.choice([0, 0, 0, 5, 128, 200])
                    table.append((row, start, end - start, first, start, end - start, first))
        table = tuple(table) or None
    block = choose.choice([16, 32, 64, 128])
    longest = query_len if table is None else max(row[2] + row[3] for row in table)
    density = choose.choice([0.02, 0.1, 0.3, 0.7])
    layout = choose.choice(
        [
            Dense(),
            SlidingWindow(choose.choice([1, 30, 128, 129, 300])),
            SinkWindow(choose.choice([1, 4, 128, 140]), choose.choice([10, 128, 333])),
            BigBird(block),
            random_blocks(heads, longest, block, density, seed),
            random_blocks(1, longest, block, density, seed),
        ]
    )
    return Case(
        layout,
        query_len,
        is_causal=choose.random() < 0.5,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=choose.choice([64, 96, 128]),
        dtype=choose.choice([torch.float16, torch.bfloat16]),
        rows_outside_heads=choose.random() < 0.7,
        table=table,
    )


@on_hopper
@pytest.mark.parametrize("seed", range(300))
def test_forward_matches_dense_attention_at_random(seed):
    check(random_case(seed))


@on_hopper
def test_forward_is_bitwise_reproducible():
    case = CASES["bigbird"]
    query, key, value = make_qkv(1, 4, 2, 2048, 2048, 128, 128, dtype=torch.bfloat16, device="cuda")
    problem = problem_of(case, "cuda")
    first = hopper.forward(query, key, value, problem, problem.scale)
    for _ in range(20):
        again = hopper.forward(query, key, value, problem, problem.scale)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@on_hopper
def test_every_reason_against_the_forward_kernel_is_given():
    query = torch.zeros(1, 1, 8, 137, device="cuda")[..., 1:]
    value = torch.zeros(1, 1, 8, 24, device="cuda")
    problem = replace(problem_of(CASES["one token"], "cuda"), softcap=1.0, dropout_p=0.5)
    reasons = "; ".join(hopper.unsupported_forward(query, query, value, value, problem, value))
    for reason in (
        "float32",
        "head_dim is 136",
        "value_dim is 24",
        "softcap",
        "sinks",
        "ALiBi",
        "dropout",
    ):
        assert reason in reasons
    assert "query has strides" in reasons and "value has strides" not in reasons


def test_other_devices_are_refused():
    query = torch.zeros(1, 1, 8, 64)
    problem = problem_of(CASES["one token"], "cpu")
    for unsupported in (hopper.unsupported_forward, hopper.unsupported_backward):
        reasons = unsupported(query, query, query, None, problem)
        assert reasons == ("the device is not of compute capability 9.0",)


def walk(
    case: Case, num_multiprocessors: int, tile: int = hopper.TILE, strip: int | None = None
) -> torch.Tensor:
    """The mask that the lists of the work records add up to; every query row must be there once and every step valid."""
    from hf_blocksparse.ops.hopper.work import make_schedule

    sequences = case.sequences("cpu")
    width = strip or tile
    index = case.index(sequences, tile, strip)
    schedule = make_schedule(index, sequences, case.heads, num_multiprocessors)
    assert schedule.num_programs <= num_multiprocessors
    bits, indices, mask_ids = index.bank_bits(), index.kv_indices, index.kv_mask_ids
    mask = torch.zeros(case.batch, case.heads, case.query_len, case.keys, dtype=torch.bool)
    seen = torch.zeros(mask.shape[:3], dtype=torch.int32)
    bounds = schedule.offsets.tolist()
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        lengths: dict[tuple[int, int], int] = {}
        for record in schedule.records[first:last].tolist():
            batch, head, q_row, q_begin, q_end, shift, kv_begin, kv_end = record[:8]
            partial, num_partial, full, first_tile, starts, num_masked, steps, first_mask = record[
                8:
            ]
            assert steps >= 1
            assert steps <= lengths.get((batch, head), steps), "long tiles of a head come first"
            lengths[batch, head] = steps
            rows = torch.arange(q_row, q_row + tile)
            own = (rows >= q_begin) & (rows < q_end)
            seen[batch, head, rows[own]] += 1
            for step in range(steps):
                if step < num_partial:
                    entry = partial + step
                elif step < num_masked:
                    is_start = step - num_partial < starts
                    entry = full - 1 if is_start else full + steps - num_masked
                else:
                    entry = full + step - num_masked
                number, mask_id = int(indices[entry]), int(mask_ids[entry])
                if step == 0:
                    assert (number, mask_id) == (first_tile, first_mask)
                columns = torch.arange(width) + number * width + shift
                inside = (columns >= kv_begin) & (columns < kv_end)
                if step >= num_masked:
                    assert mask_id == -1 and inside.all()
                kept = torch.ones(tile, width, dtype=torch.bool) if mask_id < 0 else bits[mask_id]
                place = mask[batch, head, rows[own][:, None], columns[inside]]
                assert not (place & kept[own][:, inside]).any(), "a tile is walked twice"
                mask[batch, head, rows[own][:, None], columns[inside]] |= kept[own][:, inside]
    expected = torch.zeros_like(seen)
    for batch, q_row, q_len, *_ in sequences.table.tolist():
        expected[batch, :, q_row : q_row + q_len] = 1
    assert torch.equal(seen, expected)
    return mask


@without_gpu
@pytest.mark.parametrize("name", WALKED)
def test_work_lists_hold_every_tile_once(name):
    case = CASES[name]
    assert torch.equal(walk(case, 5), case.mask())


@without_gpu
@pytest.mark.parametrize("seed", range(6))
def test_work_lists_hold_every_tile_once_at_random(seed):
    case = random_case(seed)
    if case.index(case.sequences("cpu")).num_tiles:
        assert torch.equal(walk(case, 30), case.mask())


@without_gpu
def test_work_is_balanced():
    """Some rows as long as a whole multiprocessor's share, all others short."""
    from hf_blocksparse.ops.hopper.work import make_schedule

    blocks = torch.eye(20, dtype=torch.bool)[None].repeat(20, 1, 1)
    blocks[:, 7] = True
    case = Case(TensorLayout.from_tensor(blocks, 128), 2560, is_causal=False, heads=20, kv_heads=20)
    sequences = case.sequences("cpu")
    schedule = make_schedule(case.index(sequences), sequences, case.heads, 30)
    steps = torch.cat((torch.zeros(1), (schedule.records[:, 14] + 1).cumsum(0)))
    loads = steps[schedule.offsets.long()].diff()
    assert loads.sum() == 20 * (21 + 19 * 2)
    assert loads.max() <= 1.1 * loads.mean(), loads


def walk_columns(case: Case, num_multiprocessors: int = 5, tile: int = hopper.TILE) -> torch.Tensor:
    """The mask that the backward kernel's work records add up to; every key row must be there once and every step valid.

    Of key tiles in parts, the parts must lie in slots of their own, in the order in which they are added up.
    """
    from hf_blocksparse.ops.hopper.work import make_column_schedule, transposed_bank

    group = case.heads // case.kv_heads
    sequences = case.sequences("cpu")
    index = case.index(sequences, tile)
    schedule = make_column_schedule(
        index, sequences, case.heads, case.kv_heads, num_multiprocessors
    )
    words = transposed_bank(index)
    assert words.shape == (index.bank.shape[0], tile, tile // 32)
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(-2).mT
    assert torch.equal(bits, index.bank_bits())
    indices, mask_ids = index.q_indices.tolist(), index.q_mask_ids.tolist()
    mask = torch.zeros(case.batch, case.heads, case.query_len, case.keys, dtype=torch.bool)
    seen = torch.zeros(case.batch, case.kv_heads, case.keys, dtype=torch.int32)
    slots: dict[int, tuple[int, int]] = {}
    walked: dict[int, list[tuple[int, int, int]]] = {}
    columns: dict[int, tuple[int, ...]] = {}
    if schedule.split is not None:
        for batch, head, *rows, first, count in schedule.split.table.tolist():
            assert count > 1 and first == len(columns)
            columns |= dict.fromkeys(range(first, first + count), (batch, head, *rows))
        assert len(columns) == schedule.split.num_slots
    lengths: dict[tuple[int, int, int], int] = {}
    bounds = schedule.offsets.tolist()
    assert bounds == sorted(bounds) and bounds[0] == 0
    for place, members in enumerate(schedule.records[: bounds[-1]].tolist()):
        owner = sum(bound <= place for bound in bounds)
        total = sum(record[15] for record in members)
        assert total >= 1
        for member, record in enumerate(members):
            batch, head, kv_row, kv_begin, kv_end, shift, q_begin, q_end, first_slot = record[:9]
            partial, num_partial, full, starts, num_edges, num_masked, num_tiles, of_group = record[
                9:17
            ]
            last_edge, part = record[17:19]
            assert of_group == total
            assert head % group == member
            rows = torch.arange(kv_row, kv_row + tile)
            own = (rows >= kv_begin) & (rows < kv_end)
            if part >= 0:
                assert columns[part] == (batch, head // group, kv_row, kv_begin, kv_end)
            if member == 0:
                if part < 0 or part == min(p for p in columns if columns[p] == columns[part]):
                    seen[batch, head // group, rows[own]] += 1
                of_head = owner, batch, head
                assert total <= lengths.get(of_head, total), "long tiles of a head come first"
                lengths[of_head] = total
            for step in range(num_tiles):
                if step < num_partial:
                    entry = partial + step
                elif step < num_partial + num_edges:
                    entry = full - 1 if step - num_partial < starts else last_edge
                else:
                    entry = full + step - num_partial - num_edges
                number, mask_id = indices[entry], mask_ids[entry]
                if part >= 0:
                    walked.setdefault(part, []).append((member, step >= num_masked, number))
                queries = torch.arange(tile) + number * tile + shift
                inside = (queries >= q_begin) & (queries < q_end)
                if q_begin == q_end:
                    assert first_slot + number == -1 and num_masked == 1
                    continue
                assert inside.any()
                slot = first_slot + number
                assert 0 <= slot < schedule.num_slots
                assert slots.setdefault(slot, (batch, int(queries[0]))) == (batch, int(queries[0]))
                if step >= num_masked:
                    assert mask_id == -1 and inside.all() and own.all()
                kept = torch.ones(tile, tile, dtype=torch.bool) if mask_id < 0 else bits[mask_id]
                place = mask[batch, head, queries[inside][:, None], rows[own]]
                assert not (place & kept[inside][:, own]).any(), "a tile is walked twice"
                mask[batch, head, queries[inside][:, None], rows[own]] |= kept[inside][:, own]
    assert walked.keys() == columns.keys()
    for part in range(1, len(columns)):
        if columns[part] == columns[part - 1]:
            before, after = walked[part - 1], walked[part]
            assert before[-1][:2] <= after[0][:2], "parts lie in the order of the steps"
            assert abs(len(before) - len(after)) <= 1, "parts are of one size"
    expected = torch.zeros_like(seen)
    for batch, _, _, _, kv_row, kv_len, _ in sequences.table.tolist():
        expected[batch, :, kv_row : kv_row + kv_len] = 1
    assert torch.equal(seen, expected)
    return mask


@without_gpu
@pytest.mark.parametrize("name", WALKED)
def test_work_lists_of_key_tiles_hold_every_tile_once(name):
    case = CASES[name]
    assert torch.equal(walk_columns(case), case.mask())


@without_gpu
@pytest.mark.parametrize("seed", range(6))
def test_work_lists_of_key_tiles_hold_every_tile_once_at_random(seed):
    case = random_case(seed)
    if case.index(case.sequences("cpu")).num_tiles:
        assert torch.equal(walk_columns(case), case.mask())


@without_gpu
@pytest.mark.parametrize("name", IN_PARTS[5:])
def test_work_lists_of_key_tiles_in_parts_hold_every_tile_once(name, short_parts):
    """So many multiprocessors that all but the shortest tiles are split, some of them inside of a head, some between two."""
    case = CASES[name]
    assert torch.equal(walk_columns(case, 200), case.mask())


@without_gpu
@pytest.mark.parametrize("seed", range(4))
def test_work_lists_of_key_tiles_in_parts_hold_every_tile_once_at_random(seed, short_parts):
    case = random_case(seed)
    if case.index(case.sequences("cpu")).num_tiles:
        assert torch.equal(walk_columns(case, 40), case.mask())


@without_gpu
def test_work_of_key_tiles_is_balanced_by_parts():
    """Two columns that every query reads in four heads, all others short; nothing is split where all are alike."""
    from hf_blocksparse.ops.hopper.work import COLUMN_GROUP_TILES, make_column_schedule

    blocks = torch.eye(64, dtype=torch.bool)
    blocks[:, :2] = True
    case = Case(TensorLayout.from_tensor(blocks, 128), 8192, is_causal=False, heads=4, kv_heads=1)
    sequences = case.sequences("cpu")
    schedule = make_column_schedule(case.index(sequences), sequences, 4, 1, 8)
    tiles = schedule.records[:, 0, COLUMN_GROUP_TILES].float()
    loads = torch.cat((torch.zeros(1), tiles.cumsum(0)))[schedule.offsets.long()].diff()
    assert loads.sum() == 4 * (2 * 64 + 62)
    assert loads.max() <= 1.1 * loads.mean(), loads
    assert schedule.split is not None and 2 * 5 <= schedule.split.num_slots <= 2 * 8
    case = replace(case, layout=SlidingWindow(1024))
    assert make_column_schedule(case.index(sequences), sequences, 4, 1, 8).split is None


def run_instructions(instructions: str, given: torch.Tensor) -> torch.Tensor:
    """What `some_by_polynomial`'s instructions make of float32 [8, n]."""
    values = {f"${place}": row for place, row in enumerate(given, 8)}

    def read(name: str) -> torch.Tensor:
        if name.startswith("0f"):
            bits = int(name[2:], 16)
            bits -= (bits >> 31) << 32
            return torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        return torch.tensor(int(name)) if name.isdigit() else values[name]

    operations = {
        "ex2": torch.exp2,
        "max": torch.maximum,
        "add": torch.add,
        "sub": torch.sub,
        "fma": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
        "shl": torch.bitwise_left_shift,
        "mov": lambda a: a,
    }
    for line in instructions.strip("{} ").split(";"):
        operation, _, operands = line.strip().partition(" ")
        name, *kind = operation.split(".")
        if not name or kind == []:
            continue
        if name in operations:
            target, *sources = operands.split(", ")
            dtype = torch.float32 if kind[-1] == "f32" else torch.int32
            of_dtype = [x if x.dim() == 0 else x.view(dtype) for x in map(read, sources)]
            values[target] = operations[name](*of_dtype)
    return torch.stack([values[f"${place}"].view(torch.float32) for place in range(8)])


@without_gpu
@pytest.mark.parametrize("count", [1, 4])
def test_powers_of_two_by_polynomial(count):
    from hf_blocksparse.ops.hopper.forward_kernel import some_by_polynomial

    instructions = some_by_polynomial(count)
    assert instructions.count("ex2") == 8 - count
    given = torch.cat((torch.linspace(-126, 0, 100001), torch.tensor([0.0, -0.5, -125.5, -1.5])))
    got = run_instructions(instructions, given.expand(8, -1))
    exact = given.double().exp2()
    assert ((got.double() - exact).abs() <= 3e-6 * exact).all()
    below = run_instructions(instructions, torch.full((8, 1), -3.0e38))
    assert (below >= 0).all() and (below <= 2.0**-126).all()


def as_handed_over(part: torch.Tensor) -> torch.Tensor:
    """A 64 x 64 part of dQ in the order in which `backward_kernel.hand_over` leaves it."""
    return part.reshape(4, 2, 4, 2, 4, 2, 4, 2).permute(4, 1, 0, 2, 3, 6, 5, 7).flatten()


@without_gpu
@pytest.mark.parametrize("head_dim", [40, 96])
def test_row_terms_and_sums_of_grad_query(head_dim):
    """What stands before the backward kernel and after it, in sequences that share tensor rows' tiles."""
    from hf_blocksparse.ops.hopper.query_sums import prepare_kernel, store_kernel
    from hf_blocksparse.ops.hopper.work import make_column_schedule
    from hf_blocksparse.ops.triton.tiles import StridedRows

    def rows(tensor):
        return StridedRows(tensor, tensor.stride()[:3])

    tile, dim = hopper.TILE, 64 if head_dim <= 64 else 128
    case = CASES["tiles that start before the sequence"]
    sequences = case.sequences("cpu")
    schedule = make_column_schedule(case.index(sequences), sequences, case.heads, case.kv_heads, 5)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.query_len, head_dim)
    out, grad_out = torch.randn(2, *shape, generator=generator)
    lse, grad_lse = torch.randn(2, *shape[:3], generator=generator)
    lse[:, :, 110] = float("-inf")
    log2_sums, deltas = torch.full((2, *shape[:3]), math.nan)
    sums = torch.full((schedule.num_slots, case.heads, tile * dim), math.nan)
    items = sequences.q_items(tile)
    grid = (items.shape[0], case.heads)
    place = (items, sequences.table, schedule.first_slots)
    prepare_kernel[grid](
        rows(out), rows(grad_out), rows(lse), rows(grad_lse), rows(log2_sums), rows(deltas),
        sums, *place, HEAD_DIM=head_dim, DIM=dim,
    )  # fmt: skip
    expected = (out * grad_out).sum(-1) - grad_lse
    grad_query = torch.randn(shape, generator=generator)
    is_own = torch.zeros(case.batch, case.query_len, dtype=torch.bool)
    for number, (batch, q_row, q_len, q_pos, *_) in enumerate(sequences.table.tolist()):
        own = slice(q_row, q_row + q_len)
        is_own[batch, own] = True
        has_key = lse[batch, :, own].isfinite()
        assert torch.equal(log2_sums[batch, :, own].isposinf(), ~has_key)
        torch.testing.assert_close(
            log2_sums[batch, :, own][has_key], lse[batch, :, own][has_key] * math.log2(math.e)
        )
        torch.testing.assert_close(
            deltas[batch, :, own], torch.where(has_key, expected[batch, :, own], 0)
        )
        for tile_number in range(q_pos // tile, (q_pos + q_len - 1) // tile + 1):
            sums_of_tile = sums[int(schedule.first_slots[number]) + tile_number]
            assert (sums_of_tile == 0).all()
            padded = torch.full((case.heads, tile, dim), math.nan)
            first = tile_number * tile - q_pos + q_row
            start, stop = max(first, q_row), min(first + tile, q_row + q_len)
            padded[:, start - first : stop - first, :head_dim] = grad_query[batch, :, start:stop]
            for head in range(case.heads):
                # Parts lie row by row: of 64 rows and columns, in the order of steps and consumers.
                squares = padded[head].reshape(2, 64, dim // 64, 64).transpose(1, 2).flatten(0, 1)
                sums_of_tile[head] = torch.cat([as_handed_over(square) for square in squares])
    assert log2_sums.transpose(1, 2)[~is_own].isnan().all()
    assert deltas.transpose(1, 2)[~is_own].isnan().all()
    stored = torch.full(shape, 7.0).transpose(1, 2).contiguous().transpose(1, 2)
    store_kernel[grid](sums, rows(stored), *place, 0.5, HEAD_DIM=head_dim, DIM=dim)
    assert torch.equal(
        stored, torch.where(is_own[:, None, :, None], 0.5 * grad_query, torch.tensor(7.0))
    )
