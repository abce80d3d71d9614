"""A pytest plugin for transformers' own model tests: run them with block-sparse attention (dense layout) in the place of "sdpa".

    python -m pytest -p conformance.plugin --attention ours --outcomes out.json tests/models/llama/test_modeling_llama.py

`--attention theirs` changes nothing and writes the same record, to compare with. Models that do not support "sdpa" take ours as their
default. Layers in which a layout has no meaning (cross-attention) keep transformers' own, as `patch_model` keeps them; all others compute
with `--impl torch`, as with "auto" a dense layout would be handed over to the attention that this is to be compared with.
"""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest

# Where transformers' own function goes while ours has its name.
THEIRS = "conformance_dense"


class _Outcomes:
    """The worst outcome of every test, the error of those that failed, and how often each reached our attention."""

    def __init__(self, path: Path):
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.calls = 0

    def record(self, test: str, outcome: str, error: str | None) -> None:
        known = self.tests.setdefault(test, {"outcome": outcome, "error": error, "calls": 0})
        order = ("passed", "skipped", "failed")
        if order.index(outcome) > order.index(known["outcome"]):
            known |= {"outcome": outcome, "error": error}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.tests, indent=1) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--attention", choices=("ours", "theirs"), required=True)
    group.addoption("--outcomes", type=Path, required=True, help="JSON to write")
    group.addoption("--impl", choices=("torch", "auto"), default="torch")
    group.addoption("--seconds-per-test", type=int, default=150)


_outcomes: _Outcomes


def pytest_configure(config: pytest.Config) -> None:
    global _outcomes
    _outcomes = _Outcomes(config.getoption("--outcomes"))
    if config.getoption("--attention") == "ours":
        install(_outcomes, config.getoption("--impl"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    seconds = item.config.getoption("--seconds-per-test")

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    _outcomes.calls = 0
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    error = None
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        error = str(report.longrepr if crash is None else crash.message)[:2000]
    _outcomes.record(report.nodeid, report.outcome, error)
    _outcomes.tests[report.nodeid]["calls"] += _outcomes.calls
    _outcomes.calls = 0


def pytest_sessionfinish() -> None:
    _outcomes.write()


def install(outcomes: _Outcomes, impl: Any) -> None:
    """Give the name "sdpa" to our attention and mask functions, and a dense layout to every attention module."""
    import torch
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    from hf_blocksparse import Dense
    from hf_blocksparse.model_layouts import (
        LayerAttention,
        attach,
        attention_modules,
        is_cross_attention,
        state_of,
        stop_watching,
    )
    from hf_blocksparse.transformers_hook import block_sparse_attention_forward
    from hf_blocksparse.transformers_masks import make_mask
    from hf_blocksparse.transformers_trace import traceable

    def give_layout(path: str, module: torch.nn.Module) -> None:
        layout = None if is_cross_attention(path, module) else Dense()
        attach(module, LayerAttention(path, layout, THEIRS, impl=impl))
        stop_watching(module)  # some tests call models whose attention they replaced

    def attend_eagerly(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if state_of(module) is None:  # built outside a model
            give_layout("", module)
        outcomes.calls += 1
        return block_sparse_attention_forward(module, *args, **kwargs)

    ours = traceable(attend_eagerly, make_mask)
    for interface, one in zip((AttentionInterface, AttentionMaskInterface), ours, strict=True):
        interface.register(THEIRS, interface._global_mapping["sdpa"])
        interface.register("sdpa", one)
    check, post_init = (
        PreTrainedModel._check_and_adjust_attn_implementation,
        PreTrainedModel.post_init,
    )

    @functools.wraps(check)
    def check_or_ours(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # A model inside another finds the outer one's choice in the configuration.
        if attn_implementation in (None, "sdpa") and not self._supports_sdpa:
            return "sdpa"
        return check(self, attn_implementation, *args, **kwargs)

    @functools.wraps(post_init)
    def post_init_with_layouts(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = post_init(self, *args, **kwargs)
        for path, module in attention_modules(self).items():
            give_layout(path, module)
        return result

    PreTrainedModel._check_and_adjust_attn_implementation = check_or_ours
    PreTrainedModel.post_init = post_init_with_layouts
