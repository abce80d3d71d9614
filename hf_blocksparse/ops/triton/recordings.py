"""What the CPU did for a call - memory, fills, launches - kept for the next calls that differ in nothing but their tensors' numbers.

Finding out what a call needs takes Python longer than a short attention takes the GPU: which kernels, which tiles, which compiled variant,
sixty arguments. All of it follows from the call's `Problem` and from how its tensors lie in memory. So the code that does it is watched
once, in the second of several such calls, and from then on a call fills tensors into what was seen. There is no other way for a kernel to
be started from a recording than to have been started by the ordinary code.

What was watched is kept only if it was nothing but new memory, views and fills of that, and launches whose other tensors are older than
the call: those of the index and of what is made from it. They are held weakly; where one is gone the ordinary code runs again.
While a CUDA graph is captured it runs as well, as it says what the graph must keep.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_blocksparse.capture import is_capturing
from hf_blocksparse.ops.triton.argument_block import (
    Address,
    ArgumentBlock,
    Map,
    Unsuited,
    check_suited,
)

ATTEMPTS = 3
MOST_RECORDINGS = 64
"""Of one problem; more kinds of strides and alignments than this are not a loop that repeats itself."""

SCRATCH_ALIGNMENT = 512
"""Bytes; that of what torch allocates on a GPU."""

PLAIN = (Tensor, torch.nn.Parameter)

_watching = threading.local()

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_VIEWS = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.view.default,
}
_FILLS = {_aten.zero_.default: 0.0, _aten.fill_.Scalar: None}


class Refused(Exception):
    """What was watched cannot be done again."""


class _View:
    """How a tensor lies in the memory of the tensor numbered `slot`; `size` is None where it is that tensor."""

    __slots__ = ("slot", "size", "stride", "offset")

    def __init__(self, slot: int, tensor: Tensor | None = None):
        self.slot = slot
        self.size = None if tensor is None else tuple(tensor.shape)
        self.stride = () if tensor is None else tensor.stride()
        self.offset = 0 if tensor is None else tensor.storage_offset()

    def of(self, tensors: Sequence[Any]) -> Tensor:
        tensor = tensors[self.slot]
        if self.size is None:
            return tensor
        return tensor.as_strided(self.size, self.stride, self.offset)


class _Hole:
    """Where a tensor of the call, or what is made of it, stands among a kernel's arguments."""

    def of(self, tensors: Sequence[Any]) -> Any:
        """For Triton's launcher."""
        raise NotImplementedError

    def in_block(self, places: Sequence[Address]) -> Any:
        """For an `ArgumentBlock`; `places`: where the tensors lie."""
        raise NotImplementedError


class _Pointer(_Hole):
    def __init__(self, slot: int, skipped_bytes: int):
        self.slot, self.skipped_bytes = slot, skipped_bytes

    def of(self, tensors: Sequence[Any]) -> int:
        return tensors[self.slot].data_ptr() + self.skipped_bytes

    def in_block(self, places: Sequence[Address]) -> Address:
        slot, skipped_bytes = places[self.slot]
        return Address(slot, skipped_bytes + self.skipped_bytes)


class _Descriptor(_Hole):
    def __init__(self, slot: int, descriptor: Any):
        self.slot, self.kind = slot, type(descriptor)
        self.facts = vars(descriptor) | {"base": None}
        self.address = descriptor.base.data_ptr()

    def of(self, tensors: Sequence[Any]) -> Any:
        made = object.__new__(self.kind)
        made.__dict__.update(self.facts)
        made.base = tensors[self.slot]  # read for its address alone
        return made

    def in_block(self, places: Sequence[Address]) -> Map:
        facts = self.facts
        if facts.get("round_f32_to_tf32"):
            raise Unsuited("a tensor map that rounds")
        shape, strides = tuple(facts["shape"]), tuple(facts["strides"])
        return Map(places[self.slot], shape, strides, facts["padding"], self.address)


class _Tuple(_Hole):
    def __init__(self, parts: Sequence[Any]):
        self.parts = tuple(parts)

    def of(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        return _filled(self.parts, tensors)

    def in_block(self, places: Sequence[Address]) -> tuple[Any, ...]:
        return _in_block(self.parts, places)


def _filled(parts: Sequence[Any], tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([part.of(tensors) if isinstance(part, _Hole) else part for part in parts])


def _in_block(parts: Sequence[Any], places: Sequence[Address]) -> tuple[Any, ...]:
    return tuple([part.in_block(places) if isinstance(part, _Hole) else part for part in parts])


class _Allocation:
    """An uninitialised tensor."""

    def __init__(self, tensor: Tensor):
        self.storage = tensor.untyped_storage()._cdata
        self.num_bytes = tensor.untyped_storage().nbytes()
        self.size, self.stride = tuple(tensor.shape), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class _Fill(NamedTuple):
    """A step that fills a tensor of the call, or a part of it."""

    view: _View
    value: float

    def __call__(self, tensors: Sequence[Any], stream: int) -> None:
        self.view.of(tensors).fill_(self.value)


class _Launch(NamedTuple):
    """A step that starts a kernel."""

    compiled: Any
    grid: tuple[int, int, int]
    parts: tuple[Any, ...]

    def __call__(self, tensors: Sequence[Any], stream: int) -> None:
        start(self.compiled, self.grid, _filled(self.parts, tensors), stream)


class Recorder(TorchDispatchMode):
    """Watches one call. `inputs`: its tensors, None where there is none."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.inputs = tuple(inputs)
        self.allocations: list[_Allocation] = []
        self.steps: list[_Fill | _Launch] = []
        self.made: list[Tensor] = []  # and not freed meanwhile: others would get their address
        self.slot_of_storage: dict[int, int] = {}
        self.views: list[_View] = []
        self.kept: dict[int, ref[Tensor]] = {}
        self.refusal: str | None = None
        given = [id(tensor) for tensor in inputs if tensor is not None]
        if len(set(given)) < len(given):
            self.refusal = "one tensor is several inputs"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        try:
            self._note(func, args, result)
        except Refused as refused:
            self.refusal = self.refusal or str(refused)
        return result

    def __enter__(self) -> Recorder:
        _watching.recorder = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _watching.recorder = None
        super().__exit__(*error)

    def _note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if func in _EMPTY:
            slot = len(self.inputs) + len(self.made)
            self.slot_of_storage[result.untyped_storage()._cdata] = slot
            self.made.append(result)
            self.allocations.append(_Allocation(result))
        elif func in _FILLS:
            view = self._view(args[0])
            value = args[1] if len(args) > 1 else _FILLS[func]
            if view is None or view.slot < len(self.inputs) or not isinstance(value, int | float):
                raise Refused(f"{func} of what the call did not make")
            self.steps.append(_Fill(view, value))
        elif func not in _VIEWS:
            raise Refused(f"{func}")

    def _view(self, tensor: Tensor) -> _View | None:
        """Where the tensor lies among the inputs and what the call made; None for one that is older than the call."""
        for slot, known in enumerate(self.inputs):
            if tensor is known:
                return _View(slot)
        storage = tensor.untyped_storage()._cdata
        if storage in self.slot_of_storage:
            self.views.append(_View(self.slot_of_storage[storage], tensor))
            return self.views[-1]
        if any(t is not None and t.untyped_storage()._cdata == storage for t in self.inputs):
            raise Refused("a view of an input")
        return None

    def launched(self, compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
        """Notes that a kernel was started; tensors may stand in tuples and in tensor descriptors among the arguments."""
        try:
            parts = tuple([self._part(argument) for argument in arguments])
        except Refused as refused:
            self.refusal = self.refusal or str(refused)
            return
        self.steps.append(_Launch(compiled, grid, parts))

    def _part(self, argument: Any) -> Any:
        """What stays of an argument, with holes for what is to be filled in."""
        if isinstance(argument, Tensor):
            view = self._view(argument)
            if view is None:
                self.kept[id(argument)] = ref(argument)
                return argument.data_ptr()
            return _Pointer(view.slot, view.offset * argument.element_size())
        if hasattr(argument, "block_shape"):
            view = self._view(argument.base)
            if view is None or view.offset:
                raise Refused(
                    "a descriptor of a tensor that is older than the call, or of a part of one"
                )
            return _Descriptor(view.slot, argument)
        if isinstance(argument, tuple):
            parts = [self._part(part) for part in argument]
            has_holes = any(isinstance(part, _Hole) for part in parts)
            return _Tuple(parts) if has_holes else tuple(parts)
        return argument

    def finish(self, results: Sequence[Tensor | None]) -> Recording:
        """What was watched, where `results` are the call's; raises Refused if it cannot be done again."""
        places: list[_View | None] = []
        for result in results:
            view = None if result is None else self._view(result)
            if result is not None and (view is None or view.slot < len(self.inputs)):
                raise Refused("a result that the call did not make")
            places.append(view)
        if self.refusal is not None:
            raise Refused(self.refusal)
        self._make_as_used()
        device = next(t for t in self.inputs if t is not None).device
        recording = Recording(
            tuple(self.allocations),
            tuple(self.steps),
            tuple(places),
            tuple(self.kept.values()),
            device,
        )
        return recording._replace(block=block_of(recording, len(self.inputs)))

    def _make_as_used(self) -> None:
        """What is used as one view of all of it alone (heads outside of rows) is made so."""
        for allocation in self.allocations:
            slot = self.slot_of_storage[allocation.storage]
            views = [view for view in self.views if view.slot == slot]
            shapes = {(view.size, view.stride, view.offset) for view in views}
            if len(shapes) == 1:
                size, stride, offset = shapes.pop()
                if offset == 0 and math.prod(size) == math.prod(allocation.size):
                    allocation.size, allocation.stride = size, stride
                    for view in views:
                        view.size = None


class NotYet(NamedTuple):
    """How often a call was watched in vain, and why the last time."""

    attempts: int = 0
    refusal: str = ""


class _Block(NamedTuple):
    """All launches of a recording in one `ArgumentBlock`.

    Tensors that only kernels see lie in one piece of memory of `scratch_bytes`, whose slot follows those of the inputs and of the
    tensors made by `allocations`, in this order. `fills` come before the launches.
    """

    allocations: tuple[_Allocation, ...]
    scratch_bytes: int
    fills: tuple[_Fill, ...]
    arguments: ArgumentBlock
    results: tuple[_View | None, ...]


class Recording(NamedTuple):
    """What to do for another call.

    Attributes:
        allocations: tensors to be made, whose slots follow those of the inputs.
        steps: fills and launches, in their order.
        results: where the results lie.
        kept: tensors that must be alive.
        device: of all tensors.
        block: how the kernels are started with less work; where that cannot be, why.
    """

    allocations: tuple[_Allocation, ...]
    steps: tuple[_Fill | _Launch, ...]
    results: tuple[_View | None, ...]
    kept: tuple[ref[Tensor], ...]
    device: torch.device
    block: _Block | str = ""

    def play(
        self, inputs: Sequence[Tensor | None], addresses: Sequence[int]
    ) -> tuple[Tensor | None, ...] | None:
        """Results for other inputs, which lie at `addresses`; None where the recording has outlived what it was made of."""
        alive = [kept() for kept in self.kept]
        for tensor in alive:
            if tensor is None:
                return None
        tensors: list[Any] = list(inputs)
        stream = current_stream()
        block = self.block
        if isinstance(block, str) or any(_hooks()):
            tensors += [allocation.make() for allocation in self.allocations]
            for step in self.steps:
                step(tensors, stream)
            return tuple([None if view is None else view.of(tensors) for view in self.results])
        made = [allocation.make() for allocation in block.allocations]
        tensors += made
        places = [*addresses, *[tensor.data_ptr() for tensor in made]]
        for fill in block.fills:
            fill(tensors, stream)
        if block.scratch_bytes:
            # Its memory is given to nobody whose work does not come after that of these kernels.
            scratch = torch.empty(block.scratch_bytes, dtype=torch.uint8, device=self.device)
            places.append(scratch.data_ptr())
        block.arguments.start(places, stream)
        return tuple([None if view is None else view.of(tensors) for view in block.results])


def block_of(recording: Recording, num_inputs: int) -> _Block | str:
    """The launches of a recording as a block, or why Triton's launcher has to start them."""
    launches = [step for step in recording.steps if isinstance(step, _Launch)]
    fills = [step for step in recording.steps if isinstance(step, _Fill)]
    touched: set[int] = set()
    for step in recording.steps:
        if isinstance(step, _Fill) and step.view.slot in touched:
            return "a tensor is filled after a kernel was given it"
        if isinstance(step, _Launch):
            touched |= set(_slots(step.parts))
    seen = {view.slot for view in recording.results if view is not None}
    seen |= {fill.view.slot for fill in fills}
    allocations: list[_Allocation] = []
    scratch: list[tuple[int, int]] = []
    places = [Address(slot) for slot in range(num_inputs + len(recording.allocations))]
    scratch_bytes = 0
    for slot, allocation in enumerate(recording.allocations, num_inputs):
        if slot in seen:
            places[slot] = Address(num_inputs + len(allocations))
            allocations.append(allocation)
        else:
            scratch.append((slot, scratch_bytes))
            scratch_bytes += -(-allocation.num_bytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
    for slot, skipped_bytes in scratch:
        places[slot] = Address(num_inputs + len(allocations), skipped_bytes)

    def moved(view: _View) -> _View:
        other = copy(view)
        other.slot = places[view.slot].slot
        return other

    try:
        for step in launches:
            check_suited(step.compiled, step.grid)
        arguments = ArgumentBlock(
            [(step.compiled, step.grid, _in_block(step.parts, places)) for step in launches]
        )
    except Unsuited as unsuited:
        return str(unsuited)
    return _Block(
        tuple(allocations),
        scratch_bytes,
        tuple(fill._replace(view=moved(fill.view)) for fill in fills),
        arguments,
        tuple(None if view is None else moved(view) for view in recording.results),
    )


def _slots(parts: Sequence[Any]) -> Iterator[int]:
    for part in parts:
        if isinstance(part, _Tuple):
            yield from _slots(part.parts)
        elif isinstance(part, _Hole):
            yield part.slot  # type: ignore[attr-defined]


def current_stream() -> int:
    """The handle of the current stream of the current device."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


@cache
def _hooks() -> tuple[list[Any], list[Any]]:
    from triton import knobs

    return knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls


def start(compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any], stream: int) -> None:
    """Start a compiled kernel on a stream of the current device."""
    entering, leaving = _hooks()
    if entering or leaving:
        compiled[grid](*arguments, stream=stream)
        return
    # What `compiled[grid]` does where nobody listens, without asking for what listeners are told.
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
    )


def watched() -> Recorder | None:
    """The recorder that watches this thread."""
    return getattr(_watching, "recorder", None)


def recorded(
    known: dict[Any, Any],
    kind: tuple[Any, ...],
    inputs: Sequence[Tensor | None],
    run: Callable[[], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """What `run` returns for `inputs`, from a recording where one is in `known`, which holds those of one problem.

    `kind`: all that decides what `run` does, beside the problem and the inputs' strides and alignment.
    """
    parts: list[Any] = [kind]
    addresses = []
    device = None
    for tensor in inputs:
        if tensor is None:
            parts.append(None)
            addresses.append(0)
            continue
        if type(tensor) not in PLAIN:
            return run()
        device = tensor.device
        address = tensor.data_ptr()
        addresses.append(address)
        parts.append((tensor.stride(), address % 16))
    if device is None or device.type != "cuda":
        return run()
    key = tuple(parts)
    found = known.get(key)
    if is_capturing(device):
        return run()
    if isinstance(found, Recording):
        if device.index == torch._C._cuda_getDevice():
            results = found.play(inputs, addresses)
        else:
            with torch.cuda.device(device):
                results = found.play(inputs, addresses)
        if results is not None:
            return results
        found = None
    if found is None:
        # The first call builds indices and compiles, which cannot be done again.
        if len(known) >= MOST_RECORDINGS:
            known.clear()
        known[key] = NotYet()
        return run()
    if found.attempts == ATTEMPTS:
        return run()
    recorder = Recorder(inputs)
    with recorder:
        given = run()
    try:
        known[key] = recorder.finish(given)
    except Refused as refused:
        known[key] = NotYet(found.attempts + 1, str(refused))
    return given
