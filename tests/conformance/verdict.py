"""What became of a family, or of one way of running it."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, REFUSED, WRONG = "works", "refused", "wrong"
NOT_APPLICABLE = "not applicable"  # transformers itself cannot do it, or has no such thing
NOT_BUILT = "not built"  # transformers alone does not build it from small sizes, either


@dataclass(frozen=True)
class Verdict:
    """One of the outcomes above, and why."""

    outcome: str
    reason: str = ""


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:240]


def described(error: BaseException) -> str:
    """The kind of error, and the first line of what it says."""
    return first_line(f"{type(error).__name__}: {str(error).strip()}")
