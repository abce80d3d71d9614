"""The Triton kernels against dense attention in float64: in the interpreter without a GPU, on the GPU with `-m gpu`."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch
from numerics import make_qkv
from scenarios import Scenario, check
from torch.autograd import forward_ad

from hf_blocksparse import (
    BigBird,
    BlockDiagonal,
    Dense,
    Longformer,
    PerHead,
    Sequences,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    block_sparse_attention,
)
from hf_blocksparse.block_index import build_index
from hf_blocksparse.ops import triton as triton_ops
from hf_blocksparse.ops.triton import column_parts, launch
from hf_blocksparse.ops.triton.tile_sizes import TileSizes

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HAS_GPU = torch.cuda.is_available()
INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled here; run with -m gpu")
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [INTERPRETED, ON_GPU]

RANDOM_BLOCKS = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(4)) < 0.4
RANDOM = TensorLayout.from_tensor(RANDOM_BLOCKS, 32)
WINDOW = SlidingWindow(40)

SCENARIOS = {
    "one token": Scenario(Dense(), 1),
    "63 tokens": Scenario(Dense(), 63),
    "64 tokens": Scenario(WINDOW, 64),
    "65 tokens": Scenario(WINDOW, 65, is_causal=False),
    "window": Scenario(WINDOW, 200),
    "sink and window": Scenario(SinkWindow(4, 30), 150, heads=4, kv_heads=2),
    "bigbird": Scenario(BigBird(32), 230),
    "bigbird of small blocks": Scenario(BigBird(16), 100, is_causal=False),
    "longformer": Scenario(Longformer(20), 130, heads=3, kv_heads=1),
    "random blocks by head, rows without keys": Scenario(RANDOM, 256, is_causal=False),
    "another layout per head": Scenario(PerHead((Dense(), WINDOW)), 140, kv_heads=1),
    "queries at the end": Scenario(WINDOW, 70, 200),
    "decoding": Scenario(Dense(), 1, 130, heads=4, kv_heads=1),
    "head size 40, value size 24": Scenario(WINDOW, 100, head_dim=40, value_dim=24),
    "head size 80": Scenario(WINDOW, 70, head_dim=80),
    "negative scale": Scenario(WINDOW, 70, scale=-0.2),
    "scale zero": Scenario(WINDOW, 70, scale=0.0),
    "softcap": Scenario(WINDOW, 100, softcap=1.5, grad_lse=True),
    "sinks": Scenario(WINDOW, 100, heads=4, sinks=True, grad_lse=True),
    "sinks and rows without keys": Scenario(RANDOM, 200, sinks=True, grad_lse=True),
    "dropout": Scenario(WINDOW, 130, batch=2, kv_heads=1, dropout_p=0.3),
    "everything": Scenario(
        SinkWindow(3, 50),
        150,
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=24,
        softcap=3.0,
        sinks=True,
        dropout_p=0.6,
        grad_lse=True,
        rows_outside_heads=True,
    ),
    "ALiBi": Scenario(WINDOW, 130, heads=4, alibi="by head", grad_lse=True),
    "ALiBi in both directions, by batch row": Scenario(
        RANDOM | SlidingWindow(1),
        100,
        is_causal=False,
        batch=2,
        alibi="by batch row and head",
        scale=-0.2,
    ),
    "ALiBi of queries at the end": Scenario(Dense(), 70, 200, kv_heads=1, alibi="by head"),
    "ALiBi and padding": Scenario(
        WINDOW, 100, batch=2, padding=True, runs=((0, 30, 100), (1, 0, 90)), alibi="by head"
    ),
    "ALiBi, documents and everything": Scenario(
        SlidingWindow(25) | BlockDiagonal(32),
        150,
        runs=((0, 0, 3), (0, 3, 80), (0, 85, 150)),
        heads=4,
        kv_heads=2,
        softcap=3.0,
        sinks=True,
        dropout_p=0.4,
        alibi="by batch row and head",
        grad_lse=True,
    ),
    "gradient from the LSE": Scenario(WINDOW, 100, is_causal=False, grad_lse=True),
    "attn_mask": Scenario(WINDOW, 100, batch=2, mask_density=0.1, grad_lse=True),
    "padding": Scenario(
        WINDOW, 150, batch=3, padding=True, runs=((0, 30, 150), (1, 0, 97), (2, 64, 128))
    ),
    "padding, sinks": Scenario(WINDOW, 80, batch=1, padding=True, runs=((0, 30, 80),), sinks=True),
    "documents": Scenario(
        SlidingWindow(25) | BlockDiagonal(32),
        200,
        runs=((0, 0, 3), (0, 3, 110), (0, 110, 111), (0, 120, 200)),
        heads=4,
    ),
    "documents, both directions": Scenario(
        Dense(), 160, is_causal=False, batch=2, runs=((0, 5, 90), (0, 90, 160), (1, 0, 128))
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_matches_dense_attention_in_float32(name, device):
    check(SCENARIOS[name], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["window", "everything", "documents"])
def test_matches_dense_attention_in_float16(name, device):
    check(replace(SCENARIOS[name], dtype=torch.float16), device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCENARIOS)
def test_matches_dense_attention_on_tensor_cores(name, dtype):
    check(replace(SCENARIOS[name], dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "layout", [WINDOW, BigBird(16), BigBird(64), BigBird(128)], ids=lambda layout: repr(layout)
)
def test_matches_dense_attention_at_every_head_size(layout, dtype, head_dim):
    check(Scenario(layout, 1000, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", [Dense(), SlidingWindow(700), BigBird(128)], ids=repr)
def test_matches_dense_attention_at_4096_tokens(layout, is_causal, dtype):
    check(Scenario(layout, 4096, is_causal=is_causal, heads=4, head_dim=64, dtype=dtype), "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 128)], ids=str)
def test_results_do_not_depend_on_tile_sizes(tiles, device, monkeypatch):
    """Tiles of any shape, also other ones than the layout's blocks, and documents that start in the middle of one."""
    sizes = TileSizes(*tiles, num_warps=4, num_stages=1)
    monkeypatch.setattr(launch, "tile_sizes", lambda *_: sizes)
    monkeypatch.setattr(launch, "gathered_tile_sizes", lambda *_: None)
    for name in ("documents", "bigbird of small blocks"):
        check(SCENARIOS[name], device)


SCATTERED_16 = TensorLayout.from_tensor(
    torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(6)) < 0.3, 16
)
SCATTERED_32 = TensorLayout.from_tensor(
    torch.rand(8, 8, generator=torch.Generator().manual_seed(7)) < 0.5, 32
)
# Full strips alone for one head, before partial ones for the other.
_CROSS = torch.zeros(2, 16, 16, dtype=torch.bool)
_CROSS[:, :, [1, 4, 9]] = _CROSS[:, 9] = True
_CROSS[1] |= torch.rand(16, 16, generator=torch.Generator().manual_seed(9)) < 0.3
CROSS = TensorLayout.from_tensor(_CROSS, 16)

WHEREVER = 1e6  # a share of coefficients that no layout exceeds

# Lists that do not fill their last tile, strips that straddle the ends of sequences or lie behind them.
GATHERED = {
    "blocks of 16 by head": Scenario(SCATTERED_16, 250, is_causal=False, heads=4, kv_heads=2),
    "blocks of 32": Scenario(SCATTERED_32, 230, heads=2, kv_heads=1, grad_lse=True),
    "bigbird": Scenario(BigBird(16), 200, 256, head_dim=40, value_dim=24),
    "whole columns and rows, documents": Scenario(
        CROSS, 250, is_causal=False, runs=((0, 0, 90), (0, 90, 250))
    ),
    "attn_mask": Scenario(SCATTERED_16, 100, heads=4, kv_heads=4, mask_density=0.5),
    "everything": Scenario(
        SCATTERED_16,
        180,
        batch=2,
        runs=((0, 0, 3), (0, 3, 80), (0, 85, 180), (1, 10, 180)),
        heads=4,
        kv_heads=2,
        head_dim=24,
        softcap=3.0,
        sinks=True,
        dropout_p=0.4,
        alibi="by batch row and head",
        grad_lse=True,
        rows_outside_heads=True,
    ),
}


@pytest.fixture
def strips_used(monkeypatch):
    """The widths of the strips that kernels gathered, 0 for whole tiles; strips are taken wherever there are some."""
    monkeypatch.setattr(launch, "GATHERED_RATE", WHEREVER)
    monkeypatch.setattr(launch, "FIXED_KEYS", 0)
    used = set()

    def launch_and_note(kernel, grid, arguments, constants, options):
        if "STRIP" in constants:
            used.add(constants["STRIP"])
        launch_as_ever(kernel, grid, arguments, constants, options)

    launch_as_ever = launch.launch
    monkeypatch.setattr(launch, "launch", launch_and_note)
    return used


@pytest.fixture
def tiles_of_64(monkeypatch):
    """Also where smaller ones would be chosen, so that a tile holds several strips."""
    monkeypatch.setattr(launch, "tile_sizes", lambda *_: TileSizes(64, 64, 4, 3))
    monkeypatch.setattr(
        launch, "gathered_tile_sizes", lambda *facts: TileSizes(64, 64, 4, 3, strip=facts[-1])
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_tiles_match_dense_attention_in_float32(name, device, strips_used, tiles_of_64):
    scenario = GATHERED[name]
    check(scenario, device)
    assert strips_used == {scenario.layout.grain}


@pytest.mark.parametrize("device", DEVICES)
def test_gathered_tiles_match_dense_attention_in_float16(device, strips_used, tiles_of_64):
    check(replace(GATHERED["everything"], dtype=torch.float16), device)
    assert strips_used == {16}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "head_dim, block_size", [(64, 16), (80, 32), (128, 16), (128, 32), (256, 16)]
)
def test_gathered_tiles_match_dense_attention_at_every_head_size(head_dim, block_size, strips_used):
    scenario = Scenario(BigBird(block_size, random_blocks=5), 1000, heads=4, kv_heads=2)
    check(replace(scenario, head_dim=head_dim, dtype=torch.bfloat16), "cuda")
    assert strips_used == {block_size}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["blocks of 32", "whole columns and rows, documents", "everything"]
)
def test_gathered_tiles_match_dense_attention_in_bfloat16(name, strips_used):
    check(replace(GATHERED[name], dtype=torch.bfloat16), "cuda")
    assert strips_used == {GATHERED[name].layout.grain}


@pytest.fixture
def narrow_tiles(monkeypatch):
    """How long the shorter side of every kernel's tiles was, which is that of one block wherever strips are taken."""

    def sizes(backend, capability, direction, *rest):
        block_size = rest[-1]
        tile = (64, block_size) if direction == "grad_key_value" else (block_size, 64)
        known = sizes_as_ever(backend, capability, direction, *rest)
        return known or TileSizes(*tile, 4, 3, strip=block_size)

    def launch_and_note(kernel, grid, arguments, constants, options):
        if "STRIP" in constants:
            used.add(min(constants["TILE_Q"], constants["TILE_KV"]))
        launch_as_ever(kernel, grid, arguments, constants, options)

    used = set()
    launch_as_ever, sizes_as_ever = launch.launch, launch.narrow_tile_sizes
    monkeypatch.setattr(launch, "launch", launch_and_note)
    monkeypatch.setattr(launch, "narrow_tile_sizes", sizes)
    monkeypatch.setattr(launch, "narrow_rate", lambda *_: WHEREVER)
    return used


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GATHERED)
def test_narrow_tiles_match_dense_attention_in_float32(
    name, device, strips_used, tiles_of_64, narrow_tiles
):
    scenario = GATHERED[name]
    check(scenario, device)
    assert strips_used == {scenario.layout.grain} == narrow_tiles


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (128, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", GATHERED)
def test_narrow_tiles_match_dense_attention_on_tensor_cores(
    name, head_dim, dtype, strips_used, narrow_tiles
):
    scenario = replace(GATHERED[name], head_dim=head_dim, value_dim=None, dtype=dtype)
    check(scenario, "cuda")
    assert strips_used == {scenario.layout.grain} == narrow_tiles


@pytest.mark.parametrize("device", DEVICES)
def test_long_columns_of_narrow_key_tiles_in_parts_match_dense_attention(
    device, strips_used, tiles_of_64, narrow_tiles, in_parts
):
    check(GATHERED["whole columns and rows, documents"], device)
    assert narrow_tiles == {16} and in_parts


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_are_gathered_where_blocks_are_scattered(device, strips_used, monkeypatch):
    monkeypatch.setattr(launch, "GATHERED_RATE", 0.7)
    query, key, value = make_qkv(1, 1, 1, 256, 256, 16, 16, dtype=torch.float32, device=device)
    diagonal = torch.eye(16, dtype=torch.bool)
    scattered = diagonal[:, torch.randperm(16, generator=torch.Generator().manual_seed(8))]
    options = dict(block_size=16, impl="triton")
    block_sparse_attention(query, key, value, scattered, **options)
    assert strips_used == {16}
    strips_used.clear()
    block_sparse_attention(query, key, value, torch.ones(16, 16).tril(), **options)
    assert strips_used == {0}
    strips_used.clear()
    # Beside so much it does not matter that half of 64 keys are left out.
    monkeypatch.setattr(launch, "FIXED_KEYS", 150)
    block_sparse_attention(query, key, value, scattered, **options)
    assert strips_used == {0}


def shared_by_groups(num_blocks: int, block_size: int, groups: int, group_size: int) -> PerHead:
    """Scattered blocks and the diagonal, others for each group of heads."""
    layouts = []
    for group in range(groups):
        kept = torch.rand(num_blocks, num_blocks, generator=torch.Generator().manual_seed(group))
        kept = (kept < 0.3) | torch.eye(num_blocks, dtype=torch.bool)
        layouts += group_size * [TensorLayout.from_tensor(kept, block_size)]
    return PerHead(tuple(layouts))


# Heads of a group that share a layout, with the number of them whose rows fill a tile of 64.
PACKED = {
    "four heads, blocks of 16": (4, Scenario(shared_by_groups(16, 16, 2, 4), 250, heads=8)),
    "four heads, blocks of 32": (2, Scenario(shared_by_groups(8, 32, 2, 4), 230, heads=8)),
    "two heads": (
        2,
        Scenario(SCATTERED_32 & shared_by_groups(16, 16, 2, 2), 250, heads=4, is_causal=False),
    ),
    "three heads": (4, Scenario(shared_by_groups(16, 16, 2, 3), 180, 256, heads=6, grad_lse=True)),
    "six heads": (4, Scenario(shared_by_groups(8, 16, 1, 6), 128, heads=6, kv_heads=1)),
    "pairs of a group": (2, Scenario(shared_by_groups(8, 16, 4, 2), 128, heads=8)),
    "attn_mask": (
        4,
        Scenario(
            shared_by_groups(12, 16, 1, 4),
            170,
            batch=2,
            heads=4,
            kv_heads=1,
            mask_density=0.5,
            mask_by_head=False,
        ),
    ),
    "attn_mask by head": (
        1,
        Scenario(shared_by_groups(8, 16, 1, 4), 120, heads=4, kv_heads=1, mask_density=0.5),
    ),
    "padding": (
        4,
        Scenario(
            shared_by_groups(12, 16, 2, 4),
            150,
            batch=3,
            heads=8,
            padding=True,
            runs=((0, 30, 150), (1, 0, 97), (2, 64, 128)),
        ),
    ),
    "everything": (
        4,
        Scenario(
            shared_by_groups(12, 16, 2, 3),
            180,
            batch=2,
            runs=((0, 0, 3), (0, 3, 80), (0, 85, 180), (1, 10, 180)),
            heads=6,
            head_dim=24,
            value_dim=40,
            softcap=3.0,
            sinks=True,
            dropout_p=0.4,
            alibi="by batch row and head",
            grad_lse=True,
            rows_outside_heads=True,
        ),
    ),
}


@pytest.fixture
def members_used(monkeypatch):
    """How many heads filled the query tiles of kernels; strips are taken wherever there are some."""
    monkeypatch.setattr(launch, "GATHERED_RATE", WHEREVER)
    monkeypatch.setattr(launch, "FIXED_KEYS", 0)
    used = set()

    def launch_and_note(kernel, grid, arguments, constants, options):
        if "MEMBERS" in constants:
            used.add(constants["MEMBERS"])
        launch_as_ever(kernel, grid, arguments, constants, options)

    launch_as_ever = launch.launch
    monkeypatch.setattr(launch, "launch", launch_and_note)
    return used


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_heads_match_dense_attention_in_float32(name, device, members_used, tiles_of_64):
    members, scenario = PACKED[name]
    check(scenario, device)
    assert members_used == {members}


@pytest.mark.parametrize("device", DEVICES)
def test_heads_fill_a_tile_together_where_each_could_have_a_narrow_one(
    device, members_used, tiles_of_64, narrow_tiles, monkeypatch
):
    """Both kinds have strips of one shape; heads with lists of their own have narrow tiles."""
    monkeypatch.setattr(launch, "GATHERED_RATE", 0.75)
    monkeypatch.setattr(launch, "narrow_rate", lambda *_: 0.6)
    packed = PACKED["four heads, blocks of 16"][1]
    check(packed, device)
    assert members_used == {4}
    members_used.clear()
    narrow_tiles.clear()
    check(replace(packed, layout=SCATTERED_16, heads=4, kv_heads=1), device)
    assert members_used == {1} and narrow_tiles == {16}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["four heads, blocks of 32", "everything"])
def test_packed_heads_match_dense_attention_in_float16(name, device, members_used, tiles_of_64):
    members, scenario = PACKED[name]
    check(replace(scenario, dtype=torch.float16), device)
    assert members_used == {members}


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (128, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_heads_match_dense_attention_on_tensor_cores(name, head_dim, dtype, members_used):
    members, scenario = PACKED[name]
    check(replace(scenario, head_dim=head_dim, value_dim=None, dtype=dtype), "cuda")
    assert members_used == {members}


IN_PARTS = {
    "one key head for all": Scenario(SinkWindow(70, 30), 330, heads=4, kv_heads=1),
    "bigbird": Scenario(BigBird(32), 230, is_causal=False, heads=4, kv_heads=2),
    "another layout per head": Scenario(
        PerHead((Dense(), WINDOW, SlidingWindow(1), Dense())), 200, heads=4, kv_heads=2
    ),
    "queries at the end": Scenario(Dense(), 130, 300, heads=2, kv_heads=1),
    "documents and everything": Scenario(
        Dense(),
        330,
        batch=2,
        runs=((0, 0, 3), (0, 3, 280), (0, 285, 330), (1, 10, 330)),
        heads=4,
        kv_heads=2,
        head_dim=24,
        value_dim=40,
        softcap=3.0,
        sinks=True,
        dropout_p=0.4,
        alibi="by batch row and head",
        grad_lse=True,
        rows_outside_heads=True,
    ),
}


@pytest.fixture
def in_parts(monkeypatch):
    """Long columns are those of more than two steps, as if a GPU had nothing else to do; the numbers of parts and of split columns."""
    made = []

    def add_parts(split, *arguments):
        made.append((split.num_slots, split.table.shape[0]))
        launch_add_parts(split, *arguments)

    launch_add_parts = launch.launch_add_parts
    monkeypatch.setattr(launch, "launch_add_parts", add_parts)
    monkeypatch.setattr(column_parts, "SHORTEST_PART", 1)
    monkeypatch.setattr(column_parts, "SHORT", 2)
    monkeypatch.setattr(column_parts, "PROGRAMS_PER_MULTIPROCESSOR", 256)
    monkeypatch.setattr(column_parts, "_column_parts", WeakKeyDictionary())
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", IN_PARTS)
def test_long_columns_in_parts_match_dense_attention_in_float32(name, device, in_parts):
    check(IN_PARTS[name], device)
    ((num_parts, num_columns),) = in_parts
    assert num_parts > num_columns > 0


@pytest.mark.parametrize("device", DEVICES)
def test_long_columns_in_parts_match_dense_attention_in_float16(device, in_parts):
    check(replace(IN_PARTS["one key head for all"], dtype=torch.float16), device)
    assert in_parts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["whole columns and rows, documents", "everything"])
def test_long_columns_of_strips_in_parts_match_dense_attention(
    name, device, strips_used, tiles_of_64, in_parts
):
    check(GATHERED[name], device)
    assert strips_used == {16} and in_parts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_long_columns_in_parts_match_dense_attention_on_tensor_cores(name, dtype, in_parts):
    check(replace(IN_PARTS[name], dtype=dtype, head_dim=64, value_dim=None), "cuda")
    assert in_parts


@pytest.mark.gpu  # the interpreter runs one program after the other
def test_gradients_of_long_columns_are_bitwise_reproducible(in_parts):
    scenario = IN_PARTS["one key head for all"]
    inputs = scenario.inputs("cuda")

    def attend(query, key, value, _):
        return block_sparse_attention(
            query, key, value, scenario.layout, is_causal=True, return_lse=True, impl="triton"
        )

    first, second = inputs.results(attend), inputs.results(attend)
    assert len(in_parts) == 2
    assert torch.equal(first.grad_key, second.grad_key)
    assert torch.equal(first.grad_value, second.grad_value)


def test_columns_are_cut_for_as_many_programs_as_run_at_a_time(monkeypatch):
    """Programs of two warps and of one take the room of fewer."""
    device, asked = torch.device("cpu"), []
    monkeypatch.setattr(column_parts, "make_column_parts", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(column_parts, "processors", lambda _: 10)
    index = build_index(
        WINDOW, is_causal=True, num_heads=1, query_end=1600, key_end=1600, tile_q=16, tile_kv=16,
        device=device,
    )  # fmt: skip
    sequences = Sequences.uniform(1, 1600, 1600, 0, device)
    for num_warps in (8, 4, 2, 1):
        column_parts.column_parts_for(index, sequences, None, 1, 1, 64, 16, num_warps)
    assert asked == [20, 20, 40, 80]


def test_parts_cover_every_step_once_in_order():
    steps = torch.tensor([100, 7, 0, 64, 33, 1000, 5])
    num_parts = column_parts.count_parts(steps, 10)
    # A share is 120 steps: only the column of 1,000 is longer, and parts have 60 at least.
    assert num_parts.tolist() == [1, 1, 1, 1, 1, 16, 1]
    assert column_parts.count_parts(steps[:5], 2) is None
    num_parts[2] = 0
    parts = column_parts.cut(steps, num_parts)
    assert parts.column.tolist() == [0, 1, 3, 4] + 16 * [5] + [6]
    assert parts.slot.tolist() == 4 * [-1] + list(range(16)) + [-1]
    for column in parts.column.unique().tolist():
        begin, end = parts.begin[parts.column == column], parts.end[parts.column == column]
        assert begin[0] == 0 and end[-1] == steps[column]
        assert torch.equal(begin[1:], end[:-1])
        assert (end - begin).max() - (end - begin).min() <= 1
    columns = torch.arange(35).view(7, 5)
    split = column_parts.split_columns(columns, num_parts)
    assert split.table.tolist() == [[*columns[5].tolist(), 0, 16]] and split.num_slots == 16


def test_columns_nearly_as_long_as_a_share_are_cut_where_they_could_be_begun_last():
    steps = torch.tensor([180, 150, 120, 550])  # a share is 200
    assert column_parts.count_parts(steps, 5).tolist() == [1, 1, 1, 5]
    in_grid = column_parts.count_parts(steps, 5, column_parts.LONG_IN_GRID)
    assert in_grid.tolist() == [2, 1, 1, 5]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_descriptors_cannot_read(device):
    """A base that is not a multiple of 16 bytes, an odd stride, a last axis that is not contiguous."""
    query, key, value = make_qkv(1, 2, 2, 70, 70, 16, 16, dtype=torch.float32, device=device)
    expected = block_sparse_attention(query, key, value, WINDOW, impl="triton")
    odd = torch.zeros(2 * 70 * 17 + 1, device=device)[1:].view(1, 2, 70, 17)[..., :16]
    shifted = odd.copy_(key)
    assert launch._descriptor(shifted, 64) is None
    transposed = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    ours = block_sparse_attention(query, shifted, transposed, WINDOW, impl="triton")
    assert torch.equal(ours, expected)


@pytest.mark.gpu  # the interpreter runs one program after the other
def test_results_are_bitwise_reproducible():
    inputs = SCENARIOS["everything"].inputs("cuda")

    def attend(query, key, value, sinks):
        return block_sparse_attention(
            query, key, value, WINDOW, sinks=sinks, is_causal=True, return_lse=True, impl="triton"
        )

    first, second = inputs.results(attend), inputs.results(attend)
    for name, tensor in vars(first).items():
        assert torch.equal(tensor, getattr(second, name)), name


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for_is_differentiated(device):
    query, key, value = make_qkv(1, 2, 1, 40, 40, 16, 16, dtype=torch.float32, device=device)
    value.requires_grad_()
    out = block_sparse_attention(query, key, value, WINDOW, is_causal=True, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), value)
    # Every row's weights sum to one, so the gradients do, too.
    torch.testing.assert_close(grad.sum(2), torch.full_like(grad.sum(2), 2 * 40.0))


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_derivative_names_the_remedy(device):
    query, key, value = (
        tensor.requires_grad_()
        for tensor in make_qkv(1, 2, 2, 20, 20, 16, 16, dtype=torch.float32, device=device)
    )
    out = block_sparse_attention(query, key, value, WINDOW, impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative.*use impl='torch'"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_mode_derivative_is_not_lost_without_gradients(device):
    query, key, value = make_qkv(1, 2, 2, 20, 20, 16, 16, dtype=torch.float32, device=device)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(RuntimeError, match="forward mode AD"):
            block_sparse_attention(dual, key, value, WINDOW, impl="triton")


@pytest.mark.parametrize("device", DEVICES)
def test_slopes_with_a_gradient_name_the_remedy(device):
    query, key, value = make_qkv(1, 2, 2, 20, 20, 16, 16, dtype=torch.float32, device=device)
    slopes = torch.rand(2, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"constant slopes: alibi_slopes.detach\(\)"):
        block_sparse_attention(query, key, value, WINDOW, alibi_slopes=slopes, impl="triton")
    with torch.no_grad():
        block_sparse_attention(query, key, value, WINDOW, alibi_slopes=slopes, impl="triton")


@pytest.mark.parametrize("device", DEVICES)
def test_the_forward_saves_nothing_that_grows_with_the_tiles(device):
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    query, key, value = (
        tensor.requires_grad_()
        for tensor in make_qkv(1, 2, 2, 300, 300, 16, 16, dtype=torch.float32, device=device)
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_sparse_attention(query, key, value, Dense(), impl="triton")
    assert sum(sizes.values()) == 4 * query.numel() + 2 * 300


def test_products_of_float32_are_ieee_unless_torch_allows_tf32():
    query = torch.zeros(1, 1, 8, 16)
    sizes = TileSizes(16, 16, num_warps=4, num_stages=1)
    assert launch._constants(query, query, sizes)["INPUT_PRECISION"] == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert launch._constants(query, query, sizes)["INPUT_PRECISION"] == "tf32"
        half = query.half()
        assert launch._constants(half, half, sizes)["INPUT_PRECISION"] == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_every_reason_is_given_at_once(monkeypatch):
    query = torch.zeros(1, 1, 8, 20, dtype=torch.float64)
    value = torch.zeros(1, 1, 8, 264, dtype=torch.float64)
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="use impl='torch'") as raised:
        block_sparse_attention(query, query, value, Dense(), impl="triton")
    message = str(raised.value)
    for reason in (
        "device is cpu (needs cuda, or TRITON_INTERPRET=1",
        "dtype is torch.float64 (needs float16, bfloat16 or float32)",
        "head_dim is 20 (needs a multiple of 8 from 16 to 256)",
        "value_dim is 264 (needs a multiple of 8 from 16 to 256)",
    ):
        assert reason in message, message


def test_the_interpreter_refuses_bfloat16(monkeypatch):
    query = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "IS_INTERPRETED", True)
    with pytest.raises(NotImplementedError, match="bfloat16, whose products Triton's interpreter"):
        block_sparse_attention(query, query, query, Dense(), impl="triton")


def test_a_missing_triton_is_a_reason(monkeypatch):
    query = torch.zeros(1, 1, 8, 16)
    monkeypatch.setattr(triton_ops, "_has_triton", lambda: False)
    with pytest.raises(NotImplementedError, match=r"triton is not installed \(needs >= 3.6\)"):
        block_sparse_attention(query, query, query, Dense(), impl="triton")
