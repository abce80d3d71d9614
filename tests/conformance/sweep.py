"""Every language model that transformers' auto classes know, tiny and random: does it compute what its layout says, or say why not?

A family is built from its default configuration with small sizes (`small_models`); what transformers alone cannot build so is recorded as
that, and beside our import it has to compute the same. A model that is patched must compute with `Dense()` what it computed before, with a
window what eager attention computes within it (a batch with padding), or, where its eager attention takes no mask from transformers' mask
functions, what does not depend on tokens out of reach; and unpatching must bring back its logits bit for bit. Anything else has to be an
error that says why.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from conformance import small_models
from conformance.small_models import LAYERS, LENGTH, Alone, NotBuiltError, logits, make, read_alone
from conformance.verdict import NOT_BUILT, REFUSED, WORKS, WRONG, Verdict, described, first_line
from tiny_models import VOCABULARY, eager_attention_within, make_batch
from torch import Tensor
from transformers import PreTrainedModel

import hf_blocksparse as bs

WINDOW = 8
LAYOUT = bs.SlidingWindow(WINDOW)
# Of the largest logit: what rounding moves it by, and what it may at most move it by between transformers' own implementations.
TOLERANCE, JUDGED_BELOW = 5e-5, 2e-3


def families_alone(folder: Path, names: Sequence[str] | None = None) -> Alone:
    """What the families compute in a process without `hf_blocksparse`, which leaves its files in `folder`."""
    chosen = ["--families", *names] if names else []
    command = [sys.executable, small_models.__file__, str(folder), *chosen]
    subprocess.run(command, check=True)
    return read_alone(folder)


def examine(
    kind: str,
    config_class: type,
    model_class: type[PreTrainedModel],
    alone: list[Tensor] | str | None = None,
) -> Verdict:
    """Build one family and judge it; `alone`: what it computes, or why it is not built, without our import, where that is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, before = make(kind, config_class, model_class)
        except NotBuiltError as error:
            if isinstance(alone, list):
                return Verdict(WRONG, f"not built beside our import: {error}")
            return Verdict(NOT_BUILT, str(error))
        if isinstance(alone, str):
            return Verdict(WRONG, f"built beside our import only; without it: {alone}")
        if alone is not None and max(distances(before, alone)) > TOLERANCE:
            return Verdict(WRONG, "our import changes the logits")
        return judge(model, kind == "causal", before)


def judge(model: PreTrainedModel, is_causal: bool, before: list[Tensor]) -> Verdict:
    try:
        bs.patch_model(model, bs.Dense(), impl="torch")
        dense = logits(model)
        bs.unpatch_model(model)
        if not all(map(torch.equal, logits(model), before)):
            return Verdict(WRONG, "unpatching does not bring back the logits")
        bs.patch_model(model, LAYOUT, impl="torch")
        sparse = logits(model)
        bs.unpatch_model(model)
    except (NotImplementedError, ValueError) as error:
        return Verdict(REFUSED, first_line(str(error)))
    except Exception as error:
        return Verdict(WRONG, described(error))
    eager = eager_logits(model, is_causal)
    noise = [TOLERANCE] * len(before)
    if eager is not None:
        # Recurrent layers make much of rounding, and carry on what eager attention makes of rows without a key: means.
        noise = [max(TOLERANCE, 5 * each) for each in distances(eager[0], before)]
    judged = [each < JUDGED_BELOW for each in noise]

    def is_far(actual: list[Tensor], expected: list[Tensor]) -> bool:
        far = zip(judged, distances(actual, expected), noise, strict=True)
        return any(is_judged and distance > bound for is_judged, distance, bound in far)

    if not any(judged):
        return Verdict(
            NOT_BUILT, "transformers' own attention implementations differ by more than rounding"
        )
    if is_far(dense, before):
        return Verdict(WRONG, "a dense layout changes the logits")
    if eager is None or not is_far(eager[1], eager[0]):
        return judge_by_reach(model, is_causal)
    if is_far(sparse, eager[1]):
        return Verdict(WRONG, "a window is not what eager attention computes within it")
    return Verdict(WORKS)


def eager_logits(
    model: PreTrainedModel, is_causal: bool
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Of eager attention, dense and within the window; None where there is no eager attention."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        dense = logits(model)
        with eager_attention_within(LAYOUT, is_causal=is_causal):
            return dense, logits(model)
    except Exception:
        return None
    finally:
        model.set_attn_implementation(before)


def judge_by_reach(model: PreTrainedModel, is_causal: bool) -> Verdict:
    """Tokens that no chain of windows leads to change nothing; the nearest ones do."""
    if model.config.get_text_config().num_hidden_layers > LAYERS[0]:
        return Verdict(
            NOT_BUILT, "layers that are not attention, and no eager attention to compare with"
        )
    batch = make_batch(LENGTH, padded=False)
    bs.patch_model(model, LAYOUT, impl="torch")
    before = torch.stack(logits(model, batch))
    changed = 10
    batch["input_ids"][:, changed] = VOCABULARY - 1 - batch["input_ids"][:, changed] // 2
    moved = (torch.stack(logits(model, batch)) - before).abs().amax((0, 2))
    bound = TOLERANCE * float(before.abs().max())
    if moved[changed : changed + WINDOW].max() <= bound:
        return Verdict(WRONG, "a changed token changes nothing")
    reach = changed + LAYERS[0] * WINDOW
    if moved[reach:].max() > bound or (is_causal and moved[:changed].max() > bound):
        return Verdict(WRONG, "a token out of reach matters")
    return Verdict(WORKS, "judged by what a changed token changes")


def distances(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """By batch row: the largest difference, of the largest expected logit."""
    return [
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(actual, expected, strict=True)
    ]
