"""Calls that are done again from what was watched give what the ordinary code gives; what cannot be done again is refused."""

import gc
import threading
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from numerics import make_qkv

from hf_blocksparse import (
    Dense,
    Sequences,
    SinkWindow,
    SlidingWindow,
    TensorLayout,
    block_sparse_attention,
)
from hf_blocksparse import attention as attention_module
from hf_blocksparse.block_index import clear_cache
from hf_blocksparse.ops import triton as triton_ops
from hf_blocksparse.ops.triton import recordings
from hf_blocksparse.ops.triton.argument_block import Unsuited
from hf_blocksparse.ops.triton.recordings import Recorder, Recording, Refused

KEPT = torch.arange(5, dtype=torch.int32)


class Kernel(str):
    """Of a compiled kernel what matters: nobody but Triton's launcher can start it."""

    name = property(str)
    metadata = SimpleNamespace(target=SimpleNamespace(backend="none"))


ONE, TWO, THREE = map(Kernel, ("one", "two", "three"))


class Descriptor:
    """Of Triton's descriptors what matters: a base, and an attribute by which they are known."""

    def __init__(self, base):
        self.base, self.block_shape, self.padding = base, [1, 2], "zero"
        self.shape, self.strides = list(base.shape), list(base.stride())


@pytest.fixture
def started(monkeypatch):
    """What kernels were started with."""
    calls = []
    monkeypatch.setattr(recordings, "start", lambda *call: calls.append(call))
    monkeypatch.setattr(recordings, "current_stream", lambda: 7)
    return calls


def host_code(query, key, spoil=lambda query, key: None):
    """As launches do it: memory with heads outside of rows, parts of one tensor, fills, and two kernels."""
    out = query.new_empty(2, 3, 4).transpose(0, 1)
    first, second = query.new_empty(2, 6)
    out.zero_()
    second.fill_(float("-inf"))
    spoil(query, key)
    recorder = recordings.watched()
    if recorder is not None:
        rows = (out, out.stride())
        recorder.launched(ONE, (1, 2, 3), (query, Descriptor(key), (rows, None, KEPT), 1.5))
        recorder.launched(TWO, (4, 1, 1), (first, second, Descriptor(out), KEPT, (7, 8)))
    return out, second, None


def watch(query, key, **options):
    recorder = Recorder((query, None, key))
    with recorder:
        results = host_code(query, key, **options)
    assert recordings.watched() is None
    return recorder.finish(results)


def play(recording, *inputs):
    return recording.play(inputs, [0 if tensor is None else tensor.data_ptr() for tensor in inputs])


def test_a_recording_fills_in_other_tensors(started):
    recording = watch(torch.ones(5), torch.ones(6))
    query, key = torch.zeros(5), torch.zeros(6)
    out, second, nothing = play(recording, query, None, key)
    assert nothing is None and out.shape == (3, 2, 4) and out.stride() == (4, 12, 1)
    assert not out.any() and second.shape == (6,) and second.isneginf().all()
    one, two = started
    assert one[:2] == ("one", (1, 2, 3)) and two[:2] == ("two", (4, 1, 1)) and one[3] == 7
    pointer, descriptor, (rows, none, kept), number = one[2]
    assert pointer == query.data_ptr() and descriptor.base is key and number == 1.5
    assert rows == (out.data_ptr(), (4, 12, 1)) and none is None and kept == KEPT.data_ptr()
    first_pointer, second_pointer, descriptor, kept, strides = two[2]
    assert second_pointer == second.data_ptr() == first_pointer + 6 * 4
    assert descriptor.base.data_ptr() == out.data_ptr() and strides == (7, 8)
    again, _, _ = play(recording, query, None, key)
    assert again.data_ptr() != out.data_ptr()


def test_a_recording_holds_nothing_it_was_made_of(started):
    query, key, indices = torch.ones(5), torch.ones(6), [torch.arange(3)]

    def launch_over_an_index(query, key):
        recorder = recordings.watched()
        recorder.launched(THREE, (1, 1, 1), (*indices, Descriptor(key)))

    recording = watch(query, key, spoil=launch_over_an_index)
    assert play(recording, query, None, key) is not None
    alive = [ref(tensor) for tensor in (query, key, *indices)]
    other = torch.ones(5), None, torch.ones(6)
    del query, key
    indices.clear()
    started.clear()
    gc.collect()
    assert [tensor() for tensor in alive] == [None] * 3
    # The index is gone: the ordinary code must make another.
    assert play(recording, *other) is None and not started


class Block:
    """Of an `ArgumentBlock` what it was made of and where the tensors lay when it was started."""

    def __init__(self, launches):
        self.launches, self.started = launches, []

    def start(self, addresses, stream):
        self.started.append((addresses, stream))


@pytest.fixture
def blocks(monkeypatch, started):
    monkeypatch.setattr(recordings, "ArgumentBlock", Block)
    monkeypatch.setattr(recordings, "check_suited", lambda compiled, grid: None)
    monkeypatch.setattr(recordings, "_hooks", lambda: ([], []))


def test_a_block_gets_results_of_their_own_and_one_memory_for_the_rest(blocks, started):
    def use_scratch(query, key):
        one, other = query.new_empty(3, 5), query.new_empty(7)
        recorder = recordings.watched()
        recorder.launched(THREE, (1, 1, 1), (query, one[1], other, (other[2:], 5)))

    recording = watch(torch.ones(5), torch.ones(6), spoil=use_scratch)
    block = recording.block
    # Results are filled, so they are apart; one and other lie in one piece, each where any tensor might begin.
    assert len(block.allocations) == 2 and len(block.fills) == 2 and block.scratch_bytes == 2 * 512
    scratch = 3 + 2
    three, one, two = (arguments for _, _, arguments in block.arguments.launches)
    assert three == ((0, 0), (scratch, 5 * 4), (scratch, 512), ((scratch, 512 + 2 * 4), 5))
    out, second = 3, 4
    assert one[0] == (0, 0) and one[1].place == (2, 0) and one[1].shape == (6,)
    assert one[2:] == ((((out, 0), (4, 12, 1)), None, KEPT.data_ptr()), 1.5)
    assert two[:2] == ((second, 0), (second, 6 * 4)) and two[2].place == (out, 0)
    query, key = torch.zeros(5), torch.zeros(6)
    for _ in range(2):
        out, second, nothing = play(recording, query, None, key)
        assert nothing is None and out.stride() == (4, 12, 1) and not out.any()
        assert second.shape == (6,) and second.isneginf().all()
        addresses, stream = block.arguments.started[-1]
        assert stream == 7 and addresses[:3] == [query.data_ptr(), 0, key.data_ptr()]
        assert addresses[3:5] == [out.data_ptr(), second.data_ptr() - 6 * 4]
        assert len(addresses) == 6 and addresses[5] != 0
    assert not started and len(block.arguments.started) == 2


def test_listeners_of_launches_and_late_fills_keep_tritons_launcher(blocks, started, monkeypatch):
    recording = watch(torch.ones(5), torch.ones(6))
    monkeypatch.setattr(recordings, "_hooks", lambda: ([print], []))
    query, key = torch.zeros(5), torch.zeros(6)
    out, _, _ = play(recording, query, None, key)
    assert [call[0] for call in started] == ["one", "two"] and not recording.block.arguments.started
    assert not out.any()

    def fill_late(query, key):
        scratch = query.new_empty(4)
        recordings.watched().launched(THREE, (1, 1, 1), (scratch,))
        scratch.zero_()

    recording = watch(query, key, spoil=fill_late)
    assert recording.block == "a tensor is filled after a kernel was given it"


def test_what_a_block_refuses_is_left_to_tritons_launcher(blocks, started, monkeypatch):
    def refuse(launches):
        raise Unsuited("a reason")

    monkeypatch.setattr(recordings, "ArgumentBlock", refuse)
    query, key = torch.ones(5), torch.ones(6)
    recording = watch(query, key)
    assert recording.block == "a reason"
    play(recording, query, None, key)
    assert [call[0] for call in started] == ["one", "two"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda query, key: query + 1, "aten.add"),
        (lambda query, key: query.sum().item(), "aten.sum"),
        (lambda query, key: query.contiguous().clone(), "aten.clone"),
        (lambda query, key: query.zero_(), "aten.zero_"),
        (lambda query, key: KEPT.fill_(0), "aten.fill_"),
        (
            lambda query, key: recordings.watched().launched(THREE, (1,) * 3, (query.view(5, 1),)),
            "a view of an input",
        ),
        (
            lambda query, key: recordings.watched().launched(THREE, (1,) * 3, (Descriptor(KEPT),)),
            "a descriptor of a tensor that is older",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_again_is_refused(spoil, reason, monkeypatch):
    monkeypatch.setitem(globals(), "KEPT", KEPT.clone())
    with pytest.raises(Refused, match=reason):
        watch(torch.ones(5), torch.ones(6), spoil=spoil)


def test_one_tensor_as_two_inputs_is_refused():
    """The next call may have two: which of them was meant cannot be told."""
    query = torch.ones(5)
    with pytest.raises(Refused, match="several inputs"):
        watch(query, query)
    recorder = Recorder((query, None))
    with recorder:
        host_code(query, query)
    with pytest.raises(Refused, match="a result that the call did not make"):
        recorder.finish((query,))


def forget_calls():
    attention_module._prepare_known.cache_clear()


def results(tensors, grad_out, layout, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = block_sparse_attention(*leaves, layout, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_as_ordinary(got, tensors, grad_out, layout, **options):
    forget_calls()
    names = ("out", "lse", "grad_query", "grad_key", "grad_value")
    for name, ours, expected in zip(
        names, got, results(tensors, grad_out, layout, **options), strict=True
    ):
        assert ours.stride() == expected.stride(), name
        if name == "grad_query":  # on Hopper a sum in no fixed order
            torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-3)
        else:
            assert torch.equal(ours, expected), name


@pytest.fixture
def recorded_calls(monkeypatch):
    """The recordings of the last call's problem, by a function."""
    forget_calls()
    clear_cache()
    known = {}

    def run_and_note(*arguments):
        nonlocal known
        known = arguments[5].recordings
        return forward_as_ever(*arguments)

    forward_as_ever = triton_ops._run_forward
    monkeypatch.setattr(triton_ops, "_run_forward", run_and_note)
    yield lambda: known
    forget_calls()


def assert_recorded(known):
    others = {key: found for key, found in known.items() if not isinstance(found, Recording)}
    assert known and not others, others
    for recording in known.values():
        assert not isinstance(recording.block, str), recording.block


def draw(seed, query_len=300, kv_len=300, heads_outside=True, head_dim=64):
    shape = (2, 4, 2, query_len, kv_len, head_dim, head_dim)
    return make_qkv(
        *shape, dtype=torch.bfloat16, device="cuda", rows_outside_heads=heads_outside, seed=seed
    )


TABLE = torch.tensor([[0, 20, 200, 0, 20, 200, 0], [1, 0, 300, 0, 0, 300, 0]], dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "layout",
    [SinkWindow(4, 100), TensorLayout.from_tensor(torch.ones(3, 3), 128)],
    ids=["64", "128"],
)
def test_repeated_calls_are_as_the_first(layout, impl, is_padded, recorded_calls, poisoned_memory):
    """With "auto" on Hopper by the kernels with tiles of 64, and of 128."""
    options = dict(impl=impl, is_causal=True)
    if is_padded:
        sequences = Sequences(
            TABLE.cuda(), batch=2, query_len=300, kv_len=300, query_end=300, key_end=300,
            covers_queries=False, covers_keys=False,
        )  # fmt: skip
        options["sequences"] = sequences
    for heads_outside in (True, False):
        forget_calls()
        for seed in range(6):
            tensors = draw(seed, heads_outside=heads_outside)
            grad_out = torch.randn_like(tensors[0])
            got = results(tensors, grad_out, layout, **options)
        assert_recorded(recorded_calls())
        assert_as_ordinary(got, tensors, grad_out, layout, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_other_strides_and_addresses_are_other_recordings(impl, recorded_calls):
    layout, options = SlidingWindow(70), dict(impl=impl, is_causal=True)
    tensors = draw(0)
    grad_out = torch.randn_like(tensors[0])

    def misaligned(tensor):
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)

    kinds = (
        tensors,
        tuple(map(misaligned, tensors)),
        tuple(tensor.contiguous() for tensor in tensors),
        (tensors[0], tensors[1], tensors[1]),
    )
    given = [results(kind, grad_out, layout, **options) for _ in range(4) for kind in kinds]
    for got, kind in zip(given[-len(kinds) :], kinds, strict=True):
        assert_as_ordinary(got, kind, grad_out, layout, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_an_index_that_was_forgotten_is_built_again(impl, recorded_calls):
    layout, options = SinkWindow(4, 100), dict(impl=impl, is_causal=True)
    tensors = draw(0)
    grad_out = torch.randn_like(tensors[0])
    for _ in range(4):
        results(tensors, grad_out, layout, **options)
    clear_cache()
    gc.collect()
    used = [torch.full((1 << 20,), -1, device="cuda") for _ in range(4)]  # where the index lay
    for _ in range(4):
        got = results(tensors, grad_out, layout, **options)
    assert_as_ordinary(got, tensors, grad_out, layout, **options)
    assert all(int(tensor.max()) == -1 for tensor in used)


@pytest.mark.gpu
def test_a_recorded_call_of_few_queries(recorded_calls):
    layout, options = Dense(), dict(is_causal=True)
    for seed in range(5):
        tensors = draw(seed, query_len=3, kv_len=1000)
        with torch.no_grad():
            got = block_sparse_attention(*tensors, layout, **options)
    assert_recorded(recorded_calls())
    forget_calls()
    with torch.no_grad():
        assert torch.equal(got, block_sparse_attention(*tensors, layout, **options))


@pytest.mark.gpu
def test_recorded_calls_on_another_stream_and_in_a_graph(recorded_calls):
    layout, options = SinkWindow(4, 100), dict(is_causal=True)
    tensors, other = draw(0), draw(1)
    expected = [block_sparse_attention(*given, layout, **options) for given in (tensors, other)]
    for _ in range(3):
        block_sparse_attention(*tensors, layout, **options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        moved = [torch.empty_like(tensor).copy_(tensor) for tensor in other]
        out = block_sparse_attention(*moved, layout, **options)
    stream.synchronize()
    assert torch.equal(out, expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(*tensors, layout, **options)
    for tensor, given in zip(tensors, other, strict=True):
        tensor.copy_(given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected[1])


@pytest.mark.gpu
def test_threads_that_never_used_the_device_share_a_recording(recorded_calls):
    layout, options = SinkWindow(4, 100), dict(is_causal=True)
    drawn = [draw(seed) for seed in range(4)]
    grads = [torch.randn_like(tensors[0]) for tensors in drawn]
    expected = [results(t, g, layout, **options) for t, g in zip(drawn, grads, strict=True)]
    assert_recorded(recorded_calls())
    torch.cuda.synchronize()
    found = [[] for _ in drawn]

    def run(number):
        for _ in range(20):
            found[number].append(results(drawn[number], grads[number], layout, **options))
        torch.cuda.synchronize()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(drawn))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rounds, right in zip(found, expected, strict=True):
        assert len(rounds) == 20
        for got in rounds:
            assert torch.equal(got[0], right[0]) and torch.equal(got[1], right[1])
            for ours, one in zip(got[2:], right[2:], strict=True):
                torch.testing.assert_close(ours, one, rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
def test_launch_hooks_hear_of_recorded_calls(recorded_calls):
    from triton import knobs

    layout, heard = SinkWindow(4, 100), []
    tensors = draw(0)
    for _ in range(3):
        block_sparse_attention(*tensors, layout, is_causal=True)

    def note(metadata):
        heard.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        block_sparse_attention(*tensors, layout, is_causal=True)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    (name,) = heard
    assert name.endswith("forward_kernel")  # of tiles of 128 or 64
