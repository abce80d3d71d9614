"""What CUDA graphs ask of tensors that outlive a call: made before the capture, and kept for as long as a graph may read them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# A captured graph reads its tensors by address, so nothing it was given may be freed.
_kept: list[object] = []


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device, what: str) -> None:
    """Raise RuntimeError where `what` would have to be made while a graph is captured: that takes answers from the device."""
    if is_capturing(device):
        raise RuntimeError(
            f"block_sparse_attention got captured into a CUDA graph before {what} was built; building it waits for the device, which a "
            "capture forbids; run the same call once before the capture."
        )


def check_values_readable(device: torch.device, argument: str) -> None:
    """Raise NotImplementedError where a graph is being captured: what `argument` holds decides the launches, which a graph fixes."""
    if is_capturing(device):
        raise NotImplementedError(
            f"{argument} got a tensor while a CUDA graph is captured; its values decide what is launched, and a graph launches the same "
            "at every replay; make a Sequences of it before the capture and pass that, or put a fixed mask into a MaskLayout."
        )


def build_to_keep(device: torch.device, build: Callable[[], T]) -> T:
    """`build()`, whose tensors outlive this call, in memory that is the program's own.

    torch.compile(mode="reduce-overhead") gives the calls before a capture memory that its graphs write over, thread by thread; so what
    is to be kept is built in another thread, on the same stream.
    """
    if device.type != "cuda" or "torch._inductor.cudagraph_trees" not in sys.modules:
        return build()
    stream = torch.cuda.current_stream(device)
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                outcome["value"] = build()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def keep_for_capture(device: torch.device, value: object) -> None:
    """Hold `value` for good if a graph is being captured."""
    if is_capturing(device) and not any(value is one for one in _kept):
        _kept.append(value)


def forget_captures() -> None:
    """Let go of what captured graphs were given; they must not be replayed any more."""
    _kept.clear()
