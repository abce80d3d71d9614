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
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_blocksparse.capture import is_capturing

ATTEMPTS = 3
MOST_RECORDINGS = 64
"""Of one problem; more kinds of strides and alignments than this are not a loop that repeats itself."""

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


Fill = Callable[[list[Any]], Any]


class Recorder(TorchDispatchMode):
    """Watches one call. `inputs`: its tensors, None where there is none."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.inputs = tuple(inputs)
        self.steps: list[Callable[[list[Any], int], None]] = []
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
            self.steps.append(_Allocation(result))
        elif func in _FILLS:
            view = self._view(args[0])
            value = args[1] if len(args) > 1 else _FILLS[func]
            if view is None or view.slot < len(self.inputs) or not isinstance(value, int | float):
                raise Refused(f"{func} of what the call did not make")
            self.steps.append(lambda tensors, stream: view.of(tensors).fill_(value))
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
            values, holes = self._arguments(arguments)
        except Refused as refused:
            self.refusal = self.refusal or str(refused)
            return
        self.steps.append(
            lambda tensors, stream: start(compiled, grid, _filled(values, holes, tensors), stream)
        )

    def _arguments(self, arguments: Sequence[Any]) -> tuple[list[Any], list[tuple[int, Fill]]]:
        """What stays of some arguments, and at which places what is to be filled in."""
        parts = [self._argument(argument) for argument in arguments]
        holes = [(place, fill) for place, (_, fill) in enumerate(parts) if fill is not None]
        return [value for value, _ in parts], holes

    def _argument(self, argument: Any) -> tuple[Any, Fill | None]:
        if isinstance(argument, Tensor):
            view = self._view(argument)
            if view is None:
                self.kept[id(argument)] = ref(argument)
                return argument.data_ptr(), None
            return None, _pointer(view.slot, view.offset * argument.element_size())
        if hasattr(argument, "block_shape"):
            return None, self._descriptor(argument)
        if isinstance(argument, tuple):
            values, holes = self._arguments(argument)
            if not holes:
                return tuple(values), None
            return None, lambda tensors: tuple(_filled(values, holes, tensors))
        return argument, None

    def _descriptor(self, descriptor: Any) -> Fill:
        view = self._view(descriptor.base)
        if view is None or view.offset:
            raise Refused(
                "a descriptor of a tensor that is older than the call, or of a part of one"
            )
        slot, kind, facts = view.slot, type(descriptor), vars(descriptor) | {"base": None}
        new = object.__new__

        def make(tensors: list[Any]) -> Any:
            made = new(kind)
            made.__dict__.update(facts)
            made.base = tensors[slot]  # read for its address alone
            return made

        return make

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
        return Recording(tuple(self.steps), tuple(places), tuple(self.kept.values()), device)

    def _make_as_used(self) -> None:
        """What is used as one view of all of it alone (heads outside of rows) is made so."""
        for step in self.steps:
            if not isinstance(step, _Allocation):
                continue
            slot = self.slot_of_storage[step.storage]
            views = [view for view in self.views if view.slot == slot]
            shapes = {(view.size, view.stride, view.offset) for view in views}
            if len(shapes) == 1:
                size, stride, offset = shapes.pop()
                if offset == 0 and math.prod(size) == math.prod(step.size):
                    step.size, step.stride = size, stride
                    for view in views:
                        view.size = None


class _Allocation:
    """A step that makes an uninitialised tensor."""

    def __init__(self, tensor: Tensor):
        self.storage = tensor.untyped_storage()._cdata
        self.size, self.stride = tuple(tensor.shape), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device

    def __call__(self, tensors: list[Any], stream: int) -> None:
        tensors.append(
            torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        )


def _pointer(slot: int, skipped_bytes: int) -> Fill:
    if skipped_bytes:
        return lambda tensors: tensors[slot].data_ptr() + skipped_bytes
    return lambda tensors: tensors[slot].data_ptr()


def _filled(values: list[Any], holes: list[tuple[int, Fill]], tensors: list[Any]) -> list[Any]:
    values = values.copy()
    for place, fill in holes:
        values[place] = fill(tensors)
    return values


class NotYet(NamedTuple):
    """How often a call was watched in vain, and why the last time."""

    attempts: int = 0
    refusal: str = ""


class Recording(NamedTuple):
    """`steps` work on a list of the inputs, which they append to; `results` lie there; `kept` are the tensors that must be alive."""

    steps: tuple[Callable[[list[Any], int], None], ...]
    results: tuple[_View | None, ...]
    kept: tuple[ref[Tensor], ...]
    device: torch.device

    def play(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """Results for other inputs; None where the recording has outlived what it was made of."""
        alive = [kept() for kept in self.kept]
        for tensor in alive:
            if tensor is None:
                return None
        tensors: list[Any] = list(inputs)
        stream = current_stream()
        for step in self.steps:
            step(tensors, stream)
        return tuple([None if view is None else view.of(tensors) for view in self.results])


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
    device = None
    for tensor in inputs:
        if tensor is None:
            parts.append(None)
            continue
        if type(tensor) not in PLAIN:
            return run()
        device = tensor.device
        parts.append((tensor.stride(), tensor.data_ptr() % 16))
    if device is None or device.type != "cuda":
        return run()
    key = tuple(parts)
    found = known.get(key)
    if is_capturing(device):
        return run()
    if isinstance(found, Recording):
        if device.index == torch._C._cuda_getDevice():
            results = found.play(inputs)
        else:
            with torch.cuda.device(device):
                results = found.play(inputs)
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
