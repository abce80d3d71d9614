"""One small call of each kernel, for compute-sanitizer to look at.

    compute-sanitizer --tool memcheck python tests/sanitized_kernels.py portable
    compute-sanitizer --tool racecheck python tests/sanitized_kernels.py hopper

`planted` runs kernels with an error each, which the tool must find: one that writes past its tensor, one whose warps write different
values to one place of shared memory. `ordered` (Hopper) runs a kernel without an error, whose warps hand over shared memory by barriers
that lie there, as the kernels for Hopper do: a tool that finds hazards in it cannot judge those. The last line is a JSON object: how
often which kernel was launched. Whether results are right is for other tests; nothing is compared here, so that the tool has nothing but
the kernels and the building of their lists to look at.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import torch
import triton
import triton.language as tl
from scenarios import Scenario, results_of_kernels
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hf_blocksparse import BigBird, Dense, PerHead, SinkWindow, SlidingWindow, TensorLayout

SCATTERED = TensorLayout.from_tensor(
    torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2, 16
)
STRIPS = TensorLayout.from_tensor(
    torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.2, 32
)
HALF = Scenario(SlidingWindow(100), 200, dtype=torch.float16, head_dim=64, heads=2, kv_heads=1)
DOCUMENTS = ((0, 0, 3), (0, 3, 130), (0, 135, 200))
# The first keys' column has 128 steps of the backward, the others fewer: it is cut into parts.
LONG_COLUMN = replace(HALF, layout=SinkWindow(4, 60), heads=8)
# By what they run; each of them forward and backward, where no other is said.
PARTS = {
    # Full, partial and edge tiles; every option; decoding, split over programs and not; gathered strips, of a head and of three; a long
    # column.
    "portable": (
        "triton",
        (
            replace(HALF, layout=BigBird(64), runs=DOCUMENTS),
            replace(HALF, sinks=True, softcap=2.0, alibi="by head", dropout_p=0.2, grad_lse=True),
            replace(HALF, layout=SCATTERED, is_causal=False, head_dim=40, value_dim=24),
            replace(HALF, layout=SCATTERED.for_heads(0, 1, 2), is_causal=False, heads=3),
            replace(HALF, layout=Dense(), query_len=3, kv_len=300),
            replace(HALF, dtype=torch.float32, query_len=70),
            replace(LONG_COLUMN, query_len=1024),
        ),
    ),
    # Tiles of every kind, strips, groups of heads, documents, a padded head size, a long column.
    "hopper": (
        "auto",
        (
            replace(HALF, layout=SinkWindow(4, 150), query_len=400, grad_lse=True),
            replace(HALF, layout=PerHead((Dense(), BigBird(64))), query_len=300, head_dim=128),
            replace(HALF, layout=Dense(), runs=DOCUMENTS, is_causal=False, head_dim=96, kv_heads=2),
            replace(HALF, layout=STRIPS, query_len=500, runs=((0, 0, 130), (0, 135, 365))),
            replace(LONG_COLUMN, layout=SinkWindow(4, 1000), query_len=2048),
        ),
    ),
}


def count_launches(counts: Counter) -> None:
    """Counts every launch of a compiled kernel from now on, by name."""
    from triton import knobs

    def note(metadata) -> None:
        counts[metadata.get()["name"]] += 1

    knobs.runtime.launch_enter_hook.add(note)


@triton.jit
def planted_overrun_kernel(tensor, SIZE: tl.constexpr):
    tl.store(tensor + tl.arange(0, SIZE), 1)


@triton.jit
def planted_race_kernel(tensor, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    seen = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 cell; st.shared.b32 [cell], $1; ld.shared.b32 $0, [cell]; }",
        "=r,r",
        [places],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(tensor + places, seen)


ROUNDS = 6
CELLS = gl.constexpr(64)


@gluon.jit
def write_cells(cells, filled, free, rounds):
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    for number in range(rounds):
        mbarrier.wait(free, (number & 1) ^ 1)
        cells.store(gl.arange(0, CELLS, LAYOUT) * number)
        mbarrier.arrive(filled)


@gluon.jit
def add_cells(out, cells, filled, free, rounds):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.zeros([CELLS], gl.int32, LAYOUT)
    for number in range(rounds):
        mbarrier.wait(filled, number & 1)
        total += cells.load(LAYOUT)
        mbarrier.arrive(free)
    gl.store(out + gl.arange(0, CELLS, LAYOUT), total)


@gluon.jit
def ordered_kernel(out, rounds):
    """One warp writes, four read. A barrier of the writing lanes stands before the arrival of one of them, which releases the writes."""
    cells = gl.allocate_shared_memory(gl.int32, [CELLS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(filled, count=1)
    mbarrier.init(free, count=1)
    gl.warp_specialize(
        [
            (add_cells, (out, cells, filled, free, rounds)),
            (write_cells, (cells, filled, free, rounds)),
        ],
        [1],
        [24],
    )


def main(part: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts: Counter = Counter()
    count_launches(counts)
    if part == "planted":
        planted_race_kernel[(1,)](torch.zeros(128, dtype=torch.int32, device=device), SIZE=128)
        planted_overrun_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=device), SIZE=1024)
    elif part == "ordered":
        out = torch.zeros(CELLS.value, dtype=torch.int32, device=device)
        ordered_kernel[(1,)](out, ROUNDS, num_warps=4)
        numbers = torch.arange(CELLS.value, device=device) * sum(range(ROUNDS))
        assert torch.equal(out, numbers.int()), out
    else:
        implementation, scenarios = PARTS[part]
        for scenario in scenarios:
            results_of_kernels(scenario, scenario.inputs(device), implementation)
    if device == "cuda":
        torch.cuda.synchronize()
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
