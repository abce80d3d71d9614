"""Layouts mean what their definitions say, survive JSON, and refuse bad input."""

import copy
import dataclasses
import gc
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blocksparse.attention import resolve_layout
from hf_blocksparse.inspection import describe, inspect_layout, kept_fractions
from hf_blocksparse.layouts import (
    PRESETS,
    BigBird,
    BlockDiagonal,
    Dense,
    Intersection,
    Longformer,
    MaskLayout,
    PerHead,
    PerLayer,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    Union,
    layout_from_dict,
    layout_from_digest,
    layout_from_name,
    layout_to_mask,
    mask_to_layout,
)

ROW, COL = torch.arange(200)[:, None], torch.arange(200)[None, :]

DEFINITIONS = {
    Dense(): torch.ones(200, 200, dtype=torch.bool),
    SlidingWindow(30): (ROW - COL).abs() < 30,
    SinkWindow(4, 30): (COL < 4) | ((ROW - COL).abs() < 30),
    Longformer(30, 3): ((ROW - COL).abs() <= 15) | (COL < 3) | (ROW < 3),
    Longformer(30, 0): (ROW - COL).abs() <= 15,
    BlockDiagonal(48): ROW // 48 == COL // 48,
    BigBird(16, 3, 2, 0): ((ROW // 16 - COL // 16).abs() <= 1) | (COL < 32) | (ROW < 32),
    SlidingWindow(9) | BlockDiagonal(50): ((ROW - COL).abs() < 9) | (ROW // 50 == COL // 50),
    SlidingWindow(9) & BlockDiagonal(50): ((ROW - COL).abs() < 9) & (ROW // 50 == COL // 50),
}


def make_layouts() -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        *DEFINITIONS,
        BigBird(32, seed=5),
        TensorLayout.from_tensor(torch.rand(3, 7, 7, generator=generator) > 0.5, 32),
        MaskLayout.from_tensor(torch.rand(200, 200, generator=generator) > 0.5),
        PerHead((Dense(), SlidingWindow(3), BigBird())),
        PerLayer({0: Dense(), 7: SinkWindow(1, 2), "encoder.layers.1": SlidingWindow(3)}),
    ]


@pytest.mark.parametrize(
    ("layout", "most"),
    [
        (SlidingWindow(30), 30),
        (SinkWindow(4, 30), 30),
        (Longformer(30, 3), 16),
        (SlidingWindow(30) | SinkWindow(4, 50), 50),
        (SlidingWindow(30) & SinkWindow(4, 50), 30),
        (PerHead((Dense(), SlidingWindow(30), Longformer(80))), 30),
        # Where tokens stand decides, or an index would have to be made.
        (BlockDiagonal(48), 0),
        (BigBird(64), 0),
        (TensorLayout.from_tensor(torch.ones(4, 4), 64), 0),
    ],
    ids=repr,
)
def test_what_keeps_all_of_so_many_tokens_says_so(layout, most):
    assert [layout.keeps_all(n) for n in (1, most, most + 1)] == [most > 0, most > 0, False]
    if most:
        mask = layout.to_mask(200, num_heads=layout.fixed_heads or 1)
        assert mask[:, 100 : 100 + most, 100 : 100 + most].all()
        assert not mask[:, 100 : 101 + most, 100 : 101 + most].all()
    assert Dense().keeps_all(10**9)


@pytest.mark.parametrize("layout", DEFINITIONS, ids=repr)
@pytest.mark.parametrize("is_causal", [False, True])
def test_mask_is_the_definition(layout, is_causal):
    expected = DEFINITIONS[layout] & (COL <= ROW) if is_causal else DEFINITIONS[layout]
    assert torch.equal(layout.to_mask(200, is_causal=is_causal)[0], expected)


SIZES = st.integers(1, 40)
TABLE = torch.rand(13, 13, generator=torch.Generator().manual_seed(3)) > 0.7
LAYOUTS = st.recursive(
    st.one_of(
        st.just(Dense()),
        st.builds(SlidingWindow, SIZES),
        st.builds(SinkWindow, SIZES, SIZES),
        st.builds(Longformer, st.integers(2, 40), st.integers(0, 9)),
        st.builds(BlockDiagonal, SIZES),
        st.builds(BigBird, st.just(16), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2)),
        st.just(TensorLayout.from_tensor(TABLE, 16)),
    ),
    lambda parts: st.one_of(
        st.builds(Union, st.lists(parts, min_size=1, max_size=3)),
        st.builds(Intersection, st.lists(parts, min_size=1, max_size=3)),
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    layouts=st.lists(LAYOUTS, min_size=2, max_size=2),
    position=st.integers(0, 200),
    is_causal=st.booleans(),
)
def test_no_later_query_reads_a_key_outside_the_readable_ones(layouts, position, is_causal):
    layout = PerHead(tuple(layouts))
    intervals = layout.readable_from(position)
    ends = [end for interval in intervals for end in interval]
    assert ends == sorted(set(ends))
    inside = torch.zeros(200, dtype=torch.bool)
    for start, stop in intervals:
        inside[start:stop] = True
    read = layout.to_mask(200, is_causal=is_causal, num_heads=2)[:, position:].any(1).any(0)
    assert not (read & ~inside).any()


@pytest.mark.parametrize(
    "layout, readable",
    [
        (SlidingWindow(30), [(71, 100)]),
        (SlidingWindow(300), [(0, 100)]),
        (SinkWindow(4, 30), [(0, 4), (71, 100)]),
        (BlockDiagonal(48), [(96, 100)]),
        (BlockDiagonal(50), []),
        (Longformer(30, 3), [(0, 3), (85, 100)]),
        (BigBird(16, 3, 2, 0), [(0, 32), (80, 100)]),
        (BigBird(16, 3, 2, 1), [(0, 100)]),
        (Dense(), [(0, 100)]),
        (MaskLayout.from_tensor(torch.eye(200)), [(0, 100)]),
        (SinkWindow(4, 30) & SlidingWindow(50), [(71, 100)]),
        (SinkWindow(4, 30) & BlockDiagonal(48), [(96, 100)]),
        (SinkWindow(4, 30) | BlockDiagonal(90), [(0, 4), (71, 100)]),
        (PerHead((SinkWindow(4, 30), SlidingWindow(50))), [(0, 4), (51, 100)]),
    ],
    ids=repr,
)
def test_readable_past_keys_are_no_more_than_needed(layout, readable):
    past = [(start, min(stop, 100)) for start, stop in layout.readable_from(100) if start < 100]
    assert past == readable


@pytest.mark.parametrize("layout", make_layouts(), ids=lambda layout: layout.kind)
def test_json_round_trip_keeps_equality_and_hash(layout):
    again = layout_from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert hash(again) == hash(layout)


@pytest.mark.parametrize("layout", make_layouts(), ids=lambda layout: layout.kind)
def test_layouts_are_frozen(layout):
    name = dataclasses.fields(layout)[0].name if dataclasses.fields(layout) else "window"
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        setattr(layout, name, 1)


def test_queries_stand_at_the_end_of_the_keys():
    whole = SinkWindow(2, 9).to_mask(50, is_causal=True)
    assert torch.equal(SinkWindow(2, 9).to_mask(7, 50, is_causal=True), whole[:, -7:])


def test_random_blocks_are_drawn_without_replacement_outside_window_and_globals():
    layout = BigBird(16, window_blocks=3, global_blocks=2, random_blocks=3)
    for is_causal in (False, True):
        blocks = layout.to_mask(16 * 40, is_causal=is_causal, num_heads=4)[:, 15::16, ::16]
        plain = BigBird(16, 3, 2, 0).to_mask(16 * 40, is_causal=is_causal)[:, 15::16, ::16]
        extra = (blocks & ~plain).sum(-1)
        assert (blocks >= plain).all()
        assert (extra[:, 10:] == 3).all()
        assert not torch.equal(blocks[0], blocks[1])  # heads draw apart


def test_random_blocks_do_not_change_with_length_when_causal():
    layout = BigBird(16, seed=3)
    long = layout.to_mask(640, is_causal=True, num_heads=2)
    short = layout.to_mask(333, is_causal=True, num_heads=2)
    assert torch.equal(long[:, :333, :333], short)
    assert not layout.depends_on_length(is_causal=True)
    assert layout.depends_on_length(is_causal=False)


def test_layers_and_seeds_draw_apart_and_repeat():
    layout = BigBird(16)
    masks = [
        one.to_mask(640, is_causal=True)
        for one in (layout, layout.for_layer(1), BigBird(16, seed=1))
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], BigBird(16).for_layer(1).to_mask(640, is_causal=True))


def test_random_columns_are_spread_evenly():
    layout = BigBird(16, window_blocks=1, global_blocks=0, random_blocks=1)
    rows = layout.to_mask(16 * 256, num_heads=64)[:, ::16, ::16].float()
    counts = rows.sum((0, 1)) - 64  # without the diagonal
    assert counts.min() > 64 * 0.6 and counts.max() < 64 * 1.4


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32]
)
def test_tensor_layout_takes_any_dtype(dtype):
    blocks = torch.tril(torch.ones(2, 5, 5))
    blocks[0, 3, 0] = 0
    layout = TensorLayout.from_tensor(blocks.to(dtype), 16)
    assert torch.equal(layout.to_mask(80, num_heads=2), layout_to_mask(blocks, 16))
    assert torch.equal(layout.to_mask(70, num_heads=2), layout_to_mask(blocks, 16, 70, 70))


def test_mask_to_layout_max_pools_and_inverts():
    mask = torch.zeros(2, 70, 50)
    mask[0, 69, 49] = mask[1, 0, 16] = 3.0
    layout = mask_to_layout(mask, 16)
    assert layout.shape == (2, 5, 4)
    assert layout.sum() == 2 and layout[0, 4, 3] == 1 and layout[1, 0, 1] == 1
    blocks = (torch.rand(3, 4, 6) > 0.5).long()
    assert torch.equal(mask_to_layout(layout_to_mask(blocks, 32), 32), blocks)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", [SinkWindow(3, 20), BigBird(16), BlockDiagonal(37)], ids=repr)
def test_density_counts_coefficients(layout, is_causal):
    mask = layout.to_mask(500, is_causal=is_causal, num_heads=2)
    dense = 500 * 501 / 2 if is_causal else 500 * 500
    assert layout.density(500, is_causal=is_causal, num_heads=2) == mask.sum().item() / (2 * dense)


def test_report_counts_tiles():
    report = inspect_layout(SlidingWindow(64), 1024, is_causal=True, tile=128)
    assert report.num_tiles == 8 + 7
    assert report.tile_efficiency == report.kept / (15 * 128 * 128)
    assert inspect_layout(Dense(), 1024).tile_efficiency == 1.0


def test_picture_shows_layout_and_density():
    text = SinkWindow(16, 32).picture(256, is_causal=True, width=32)
    lines = text.splitlines()
    assert len(lines) == 1 + 16
    assert "SinkWindow(sink=16, window=32) at 256 tokens: density" in lines[0]
    assert lines[16].startswith("██") and lines[16].endswith("▒▒") and "  " in lines[16]
    assert describe(Dense(), 256).startswith("Dense() at 256 tokens: density 100.0% of the square")


def test_a_picture_tells_the_density_of_its_own_head():
    blocks = torch.stack((torch.ones(4, 4), torch.eye(4)))
    layout = TensorLayout.from_tensor(blocks, 16)
    assert "density 100.0%" in describe(layout, 64, head=0)
    assert "density 25.0%" in describe(layout, 64, head=1)
    assert "density 25.0%" in describe(layout & Dense(), 64, head=1)


def test_equal_tables_hash_equally_in_another_process(tmp_path):
    layout = TensorLayout.from_tensor(torch.eye(4), 16)
    assert hash(layout) == hash(TensorLayout([1, 4, 4], layout.data, 16))
    stored = tmp_path / "layout.pickle"
    stored.write_bytes(pickle.dumps(layout))
    code = (
        "import pathlib, pickle, sys, torch, hf_blocksparse as bs\n"
        "stored = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "assert len({stored, bs.TensorLayout.from_tensor(torch.eye(4), 16)}) == 1"
    )
    subprocess.run([sys.executable, "-c", code, str(stored)], check=True)


@pytest.mark.parametrize("layout", make_layouts(), ids=lambda layout: layout.kind)
def test_equal_layouts_have_one_digest_and_are_found_by_it(layout):
    copies = [
        layout_from_dict(layout.to_dict()),
        copy.deepcopy(layout),
        pickle.loads(pickle.dumps(layout)),
    ]
    assert {one.digest for one in copies} == {layout.digest}
    assert layout_from_digest(layout.digest) == layout


def test_other_layouts_have_other_digests():
    layouts = {*make_layouts(), *PRESETS.values(), BigBird(16), BigBird(16, layer=1)}
    layouts |= {TensorLayout.from_tensor(torch.ones(6, 6), size) for size in (16, 32)}
    assert len({layout.digest for layout in layouts}) == len(layouts)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_digest_lives_as_long_as_any_layout_that_has_it(kept):
    layouts = [SlidingWindow(12345), SlidingWindow(12345)]
    layouts.append(copy.copy(layouts[1]))
    digest = layouts[0].digest
    layouts = [layouts[kept]]
    gc.collect()
    assert layout_from_digest(digest) == layouts[0]
    layouts.clear()
    gc.collect()
    with pytest.raises(RuntimeError, match=f"layout got the digest '{digest}', which no living"):
        layout_from_digest(digest)


def test_kept_fractions_match_the_mask():
    layout = Longformer(40, 10)
    fractions = kept_fractions(layout, 128, max_cells=8)
    cells = layout.to_mask(128)[0].float().view(8, 16, 8, 16).mean((1, 3))
    torch.testing.assert_close(fractions, cells)


def test_repr_of_a_tensor_layout_tells_what_it_is():
    layout = TensorLayout.from_tensor(torch.tril(torch.ones(4, 4)), 16)
    assert repr(layout) == "TensorLayout(heads=1, rows=4, cols=4, block_size=16, kept=62.50%)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), r"SlidingWindow: window got 0; it must be an integer of at least 1; give"),
        (lambda: SinkWindow(0, 5), r"SinkWindow: sink got 0; it must be an integer of at least 1; give"),
        (lambda: SlidingWindow(2.5), r"window got 2.5; it must be an integer"),
        (lambda: BigBird(48), r"BigBird: block_size got 48; it must be one of \(16, 32, 64, 128\); choose"),
        (lambda: BigBird(random_blocks=-1), r"random_blocks got -1; it must be an integer of at least 0"),
        (lambda: TensorLayout.from_tensor(torch.ones(4), 16), r"got shape \(4,\); it must be \[blocks, blocks\] or"),
        (lambda: TensorLayout.from_tensor(torch.full((4, 4), 0.5), 16), r"got the value 0.5; it must hold 0 and 1 only; convert"),
        (lambda: TensorLayout.from_tensor(torch.ones(0, 4), 16), r"it must not be empty"),
        (lambda: TensorLayout((1, 4, 4), b"x", 16), r"data got 1 bytes that do not decompress"),
        (lambda: MaskLayout.from_tensor(torch.ones(2, 2, 2, 2)), r"it must be \[tokens, tokens\] or \[heads, tokens, tokens\]"),
        (lambda: Union(()), r"Union: layouts got none; it needs at least one"),
        (lambda: layout_from_name("bigbrid"), r"layout got the name 'bigbrid'; it must be one of \['bigbird'"),
        (lambda: layout_from_name("dense", 64), r"block_size got 64 for the token-exact preset 'dense'"),
        (lambda: resolve_layout(BigBird(64), 32), r"block_size got 32 beside BigBird.*whose own is 64; .*leave it out"),
        (lambda: resolve_layout(torch.ones(4, 4)), r"block_size got None for a layout tensor of shape \(4, 4\)"),
        (lambda: resolve_layout(torch.ones(4, 4), 48), r"block_size got 48; it must be one of"),
        (lambda: layout_from_dict({"kind": "windw"}), r"layout got kind 'windw'; it must be one of .*upgrade hf-blocksparse"),
        (lambda: layout_from_dict({"kind": "dense", "version": 2}), r"version 2; this release reads version 1; upgrade"),
        (lambda: layout_from_dict({"kind": "sliding_window", "window": 3, "hue": 1}), r"the keys \['hue'\] for kind 'sliding_window'"),
        (lambda: layout_from_dict({"kind": "sliding_window"}), r"which does not suffice .*it needs \['window'\]"),
        (lambda: PerLayer([(0, Dense()), (0, Dense())]), r"a layer may be named once"),
        (lambda: Dense().density(0), r"length got 0; it must be at least 1"),
        (lambda: mask_to_layout(torch.ones(3), 16), r"mask got shape \(3,\); it must be \[..., query_len, kv_len\]"),
        (lambda: BigBird(16.0), r"BigBird: block_size got 16.0; it must be one of"),
        (lambda: resolve_layout(torch.ones(4, 4), [16]), r"block_size got \[16\]; it must be one of"),
        (lambda: layout_from_dict({"kind": ["dense"]}), r"layout got kind \['dense'\]; it must be one of"),
        (lambda: layout_from_name(["dense"]), r"layout got the name \['dense'\]; it must be one of"),
        (lambda: layout_from_dict({"kind": "mask", "shape": [1, 2, 2], "data": "a"}),
         r"MaskLayout: data got 'a', which is not base64 .*; it must be what to_dict\(\) wrote; write it again"),
        (lambda: layout_from_dict({"kind": "per_layer", "layers": [[0]]}),
         r"PerLayer: layers got \[\[0\]\]; it must be pairs of a layer and a layout; write it with"),
        (lambda: Dense().density(5, num_heads=0), r"num_heads got 0; it must be at least 1; give"),
        (lambda: Dense().picture(64, width=1), r"max_cells got 0; it must be at least 1 .*; give more"),
        (lambda: Dense().picture(64, head=-1), r"head got -1 for Dense\(\); it must be a query head, counted from 0; give"),
        (lambda: PerHead((Dense(), Dense())).picture(64, head=2), r"head got 2 for PerHead.*give one that the layout has"),
        (lambda: layout_to_mask(torch.ones(2, 2), 16, -1), r"query_len, kv_len got -1, 32; the layout reaches 32, 32; crop"),
        (lambda: layout_to_mask(torch.ones(2), 16), r"layout got shape \(2,\); it must be \[..., query_blocks, kv_blocks\]; add"),
        (lambda: layout_to_mask(torch.ones(2, 2), 16, 40), r"query_len, kv_len got 40, 32; the layout reaches 32, 32"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Intersection((torch.ones(2, 2),)), "every entry must be a layout of one layer; wrap tensors"),
        (lambda: Union((Dense(), PerLayer({}))), "put PerLayer outermost"),
        (lambda: PerLayer({1.5: Dense()}), "key 1.5; a key must be a layer number or a module path"),
        (lambda: PerLayer({1: "dense"}), "got 'dense' for 1; a value must be a layout of one layer"),
        (lambda: resolve_layout(7), "layout got int; it must be a layout, a preset's name or a 0/1 tensor"),
        (lambda: layout_from_dict("dense"), "a stored layout must be a dict with 'kind'"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_with_the_remedy(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_presets_resolve_by_name():
    assert resolve_layout("bigbird", 32) == BigBird(32)
    assert {name: resolve_layout(name) for name in PRESETS} == PRESETS


def test_a_layout_tensor_is_packed_once_and_again_after_a_change():
    blocks = torch.ones(4, 4)
    first = resolve_layout(blocks, 16)
    assert resolve_layout(blocks, 16) is first
    blocks[3, 0] = 0
    assert resolve_layout(blocks, 16) != first
