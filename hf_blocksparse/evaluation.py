"""Measurements of causal language models: perplexity by position, repeat probe, needle recall, time, memory.

Each function takes any transformers causal model, dense or sparse, and returns a frozen dataclass
of plain numbers. Logits never exist for more than `chunk_tokens` positions at once, so long windows
fit; `next_token_losses` is the same loss for training.
"""

from __future__ import annotations

import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What `needle_recall` hides and asks for; the prompts of arXiv 2305.16300 in fewer words.
NEEDLE_STATEMENT = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
NEEDLE_QUESTION = "\nWhat is the pass key? The pass key is"
NEEDLE_ANSWER = " {key}"

# Imported once, by the process that fresh ones are forked from. None of them touches a GPU, which could
# not be used after a fork.
_PRELOADED = (
    "hf_blocksparse.evaluation",
    "hf_blocksparse.ops.hopper",
    "hf_blocksparse.ops.triton",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PositionBucket:
    """Mean loss of the tokens at positions `first_position .. end_position - 1` of their windows.

    Attributes:
        num_tokens: tokens scored, over all windows.
        nll_nats: mean negative log-likelihood of a token, in nats.
    """

    first_position: int
    end_position: int
    num_tokens: int
    nll_nats: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll_nats)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on token windows, by position in the window.

    Attributes:
        num_windows, window_tokens: how many windows of how many tokens.
        buckets: ascending positions; the last one, with the most context, is the headline.
        window_nll_nats: mean loss of each window in the last bucket; `nll_difference` pairs them.
        seconds: wall time of all windows, progress bar included; `measure_cost` measures properly.
    """

    num_windows: int
    window_tokens: int
    buckets: tuple[PositionBucket, ...]
    window_nll_nats: tuple[float, ...]
    seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity in the last bucket."""
        return self.buckets[-1].perplexity


@dataclass(frozen=True)
class NllDifference:
    """Mean difference of the loss over the same windows, in nats per token.

    `standard_error` is over windows; None for a single one.
    """

    mean_nats: float
    standard_error: float | None


@dataclass(frozen=True)
class RepeatProbe:
    """Perplexity of a passage and of its copy `gap_tokens` later: what is still read verbatim."""

    num_passages: int
    passage_tokens: int
    gap_tokens: int
    first_perplexity: float
    copy_perplexity: float


@dataclass(frozen=True)
class NeedleDistance:
    """Trials whose statement ended `distance_tokens` before the question.

    Attributes:
        num_recalled: trials in which greedy decoding gives every token of the answer.
        answer_nll_nats: mean negative log-likelihood of a token of the answer, in nats.
    """

    distance_tokens: int
    num_recalled: int
    answer_nll_nats: float


@dataclass(frozen=True)
class NeedleRecall:
    """Passkey retrieval, and its control: the same questions where nothing was hidden.

    Attributes:
        context_tokens: tokens of every prompt, answer included.
        control_recalled, control_nll_nats: of prompts with text in the statement's place; what guessing gives.
    """

    num_trials: int
    context_tokens: int
    distances: tuple[NeedleDistance, ...]
    control_recalled: int
    control_nll_nats: float


@dataclass(frozen=True)
class Cost:
    """Time and memory of one function.

    Attributes:
        seconds: wall time of each timed call, after the warm-up.
        resting_bytes: memory before the first call.
        peak_bytes: highest memory during all calls, warm-up included.
        memory_kind: "process resident set" or "cuda allocated".
    """

    seconds: tuple[float, ...]
    resting_bytes: int
    peak_bytes: int
    memory_kind: str

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def added_bytes(self) -> int:
        """Memory that the function needs on top of what was there before it."""
        return self.peak_bytes - self.resting_bytes


def _chunk_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    # Classes last, as they lie in memory: over a transposed view the softmax of a GPU is several times slower.
    logits = head(hidden).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def next_token_losses(
    model: PreTrainedModel, tokens: Tensor, *, first_target: int = 1, chunk_tokens: int = 1024
) -> Tensor:
    """Negative log-likelihood of each token given those before it, in nats.

    Args:
        model: transformers causal model. Its logits must be its output embedding of the last hidden
            state; `perplexity` checks that.
        tokens: int64 `[batch, length]`, without padding.
        first_target: first position whose loss is wanted; at least 1, as position 0 has no context.
        chunk_tokens: positions whose logits exist at once. With gradients each chunk is recomputed
            in the backward.

    Returns: float32 `[batch, length - first_target]`, differentiable.
    """
    length = tokens.shape[1]
    if not 1 <= first_target < length:
        raise ValueError(
            f"first_target got {first_target} for windows of {length} tokens; "
            f"it must lie in 1..{length - 1}; position 0 has nothing to be predicted from."
        )
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return chunked_losses(
        head, hidden[:, first_target - 1 : -1], tokens[:, first_target:], chunk_tokens=chunk_tokens
    )


def chunked_losses(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_tokens: int = 1024
) -> Tensor:
    """Cross-entropy of `head(hidden)` in nats, float32 `[batch, length]`, differentiable once.

    Args:
        head: output embedding.
        hidden: `[batch, length, hidden_size]`, what predicts `targets`.
        targets: int64 `[batch, length]`; where -100, the loss is 0.
        chunk_tokens: positions whose logits exist at once. With gradients each chunk is recomputed
            in the backward.
    """
    with_gradients = torch.is_grad_enabled()
    if with_gradients and _is_bare(head):
        return _LinearLosses.apply(hidden, head.weight, head.bias, targets, chunk_tokens)
    losses = []
    for hidden_chunk, target_chunk in zip(
        hidden.split(chunk_tokens, 1), targets.split(chunk_tokens, 1), strict=True
    ):
        if with_gradients:
            loss = checkpoint(_chunk_loss, head, hidden_chunk, target_chunk, use_reentrant=False)
        else:
            loss = _chunk_loss(head, hidden_chunk, target_chunk)
        losses.append(loss)
    return torch.cat(losses, 1)


def _is_bare(head: nn.Module) -> bool:
    """Whether calling `head` is its matrix product and nothing else: no adapter, no weights that are in
    parts, no hook that gathers or moves them.
    """
    return (
        type(head) is nn.Linear
        and head.weight.shape == (head.out_features, head.in_features)
        and "forward" not in vars(head)
        and not any(
            (head._forward_pre_hooks, head._forward_hooks)
            + (head._backward_pre_hooks, head._backward_hooks)
        )
    )


class _LinearLosses(torch.autograd.Function):
    """`chunked_losses` of a matrix product, with a third of the passes over the logits that autograd
    makes: the slope of a loss by its logits is their softmax, less one at the target.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        device = hidden.device.type
        ctx.dtype = (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else torch.promote_types(hidden.dtype, weight.dtype)
        )
        ctx.chunk_tokens = chunk_tokens
        ctx.save_for_backward(hidden, weight, bias, targets)
        losses = []
        for logits, _, target in _LinearLosses.chunks(ctx, hidden, weight, bias, targets):
            logs = F.log_softmax(logits.flatten(0, 1), -1, dtype=torch.float32)
            loss = F.nll_loss(logs, target.flatten(), reduction="none")
            losses.append(loss.view_as(target))
        return torch.cat(losses, 1)

    @staticmethod
    def chunks(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits, what they are made of, and targets of each chunk."""
        weight, bias = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        for states, target in zip(
            hidden.split(ctx.chunk_tokens, 1), targets.split(ctx.chunk_tokens, 1), strict=True
        ):
            states = states.to(ctx.dtype)
            yield F.linear(states, weight, bias), states, target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        cast = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        # Sums over chunks are float32, as long as the sequence may be.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        start = 0
        for logits, states, target in _LinearLosses.chunks(ctx, hidden, weight, bias, targets):
            slopes = torch.softmax(logits, -1, dtype=torch.float32)
            known = target.clamp(min=0)[..., None]
            slopes.scatter_add_(-1, known, slopes.new_full((), -1.0).expand(known.shape))
            end = start + target.shape[1]
            scale = torch.where(target == -100, 0.0, grad[:, start:end])[..., None]
            slopes = torch.mul(slopes, scale, out=logits)
            if grad_hidden is not None:
                grad_hidden[:, start:end] = slopes @ cast
            rows = slopes.flatten(0, 1)
            if grad_weight is not None:
                grad_weight += rows.T @ states.flatten(0, 1)
            if grad_bias is not None:
                grad_bias += rows.sum(0, dtype=torch.float32)
            start = end
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_head(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse models that change their logits after the output embedding (softcap, logit scale)."""
    tokens = tokens[:1, :8]
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model got {type(model).__name__}; perplexity needs a model with an output embedding; "
            "load it with AutoModelForCausalLM."
        )
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    if logits.isnan().any():
        raise ValueError(
            f"model got {type(model).__name__} with logits that are not numbers; nothing can be measured or trained from them; its weights "
            "or its dtype are broken: load others."
        )
    embedded = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
    if not torch.allclose(logits, embedded, rtol=1e-3, atol=1e-3):
        raise NotImplementedError(
            f"model got {type(model).__name__}, whose logits are not its output embedding of the "
            "last hidden state "
            "(a softcap, a scale or a layer lies between); the chunked loss would not be the model's; use a model "
            "without it."
        )


def _check_windows(name: str, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] == 0:
        raise ValueError(
            f"{name} got shape {tuple(windows.shape)} and dtype {windows.dtype}; "
            "it must be a non-empty int64 tensor [num_windows, tokens]; stack windows of equal "
            "length."
        )


def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    edges: Sequence[int] = (1,),
    chunk_tokens: int = 1024,
    label: str = "perplexity",
    progress: bool = True,
) -> Perplexity:
    """Perplexity of full windows, one window a call, each token with all its window before it.

    Each token is scored once (no stride). Losses are float32, their sums float64. Tokens before `edges[0]` are read but not scored.

    Args:
        windows: int64 `[num_windows, window_tokens]` on any device, without padding.
        edges: first position of each bucket, strictly ascending, from 1 on; the last bucket ends
            with the window.
        label: words beside the progress bar.
    """
    _check_windows("windows", windows)
    num_windows, length = windows.shape
    edges = tuple(edges)
    if not edges or edges[0] < 1 or edges[-1] >= length or list(edges) != sorted(set(edges)):
        raise ValueError(
            f"edges got {edges} for windows of {length} tokens; "
            f"they must be strictly ascending positions in 1..{length - 1}; drop the others."
        )
    device = next(model.parameters()).device
    sums = torch.zeros(num_windows, len(edges), dtype=torch.float64)
    spans = list(zip(edges, (*edges[1:], length), strict=True))
    start = time.perf_counter()
    with (
        _evaluation_mode(model),
        tqdm(
            total=num_windows * length,
            desc=label,
            unit="token",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        check_head(model, windows[:1].to(device))
        for number, window in enumerate(windows):
            losses = next_token_losses(
                model,
                window[None].to(device),
                first_target=edges[0],
                chunk_tokens=chunk_tokens,
            )[0].double()
            for bucket, (first, end) in enumerate(spans):
                sums[number, bucket] = losses[first - edges[0] : end - edges[0]].sum().cpu()
            bar.update(length)
            scored = sums[: number + 1, -1].sum().item() / ((number + 1) * (length - edges[-1]))
            bar.set_postfix(perplexity=f"{math.exp(scored):.3f}")
    buckets = tuple(
        PositionBucket(first, end, num_windows * (end - first), mean)
        for (first, end), mean in zip(
            spans,
            [
                sums[:, bucket].sum().item() / (num_windows * (end - first))
                for bucket, (first, end) in enumerate(spans)
            ],
            strict=True,
        )
    )
    return Perplexity(
        num_windows=num_windows,
        window_tokens=length,
        buckets=buckets,
        window_nll_nats=tuple((sums[:, -1] / (length - edges[-1])).tolist()),
        seconds=time.perf_counter() - start,
    )


def nll_difference(changed: Perplexity, baseline: Perplexity) -> NllDifference:
    """Loss of `changed` minus that of `baseline`, window by window, in the last bucket.

    Both must have scored the same tokens; what was before these may differ. Raises ValueError
    where the numbers of windows or of tokens differ.
    """
    scored = [(run.num_windows, run.buckets[-1].num_tokens) for run in (changed, baseline)]
    if scored[0] != scored[1]:
        raise ValueError(
            f"changed got (windows, scored tokens) {scored[0]} and baseline {scored[1]}; "
            "a paired difference needs the same tokens; measure both on one set."
        )
    differences = [
        left - right
        for left, right in zip(changed.window_nll_nats, baseline.window_nll_nats, strict=True)
    ]
    count = len(differences)
    return NllDifference(
        mean_nats=statistics.fmean(differences),
        standard_error=statistics.stdev(differences) / math.sqrt(count) if count > 1 else None,
    )


def repeat_probe(
    model: PreTrainedModel,
    passages: Tensor,
    fillers: Tensor,
    *,
    chunk_tokens: int = 1024,
    label: str = "repeat probe",
    progress: bool = True,
) -> RepeatProbe:
    """Perplexity of a passage, and of its copy after other text: [passage][filler][passage].

    A model that still reads the first passage predicts the copy almost perfectly. The first token
    of either is not scored.

    Args:
        passages: int64 `[num_passages, passage_tokens]`.
        fillers: int64 `[num_passages, gap_tokens]`, other text.
    """
    _check_windows("passages", passages)
    if fillers.dim() != 2 or fillers.dtype != torch.int64 or len(fillers) != len(passages):
        raise ValueError(
            f"fillers got shape {tuple(fillers.shape)} and dtype {fillers.dtype} for "
            f"{len(passages)} passages; it must be int64 [num_passages, gap_tokens]; "
            "give one filler for each passage."
        )
    num_passages, passage_tokens = passages.shape
    gap_tokens = fillers.shape[1]
    if passage_tokens < 2:
        raise ValueError(
            f"passages got {passage_tokens} tokens each; a passage needs 2 or more, as its first "
            "is not scored; take longer passages."
        )
    device = next(model.parameters()).device
    copy_start = passage_tokens + gap_tokens
    first_sum = copy_sum = 0.0
    probes = torch.cat((passages, fillers, passages), 1)
    with (
        _evaluation_mode(model),
        tqdm(
            total=probes.numel(), desc=label, unit="token", unit_scale=True, disable=not progress
        ) as bar,
    ):
        check_head(model, probes[:1].to(device))
        for probe in probes:
            losses = next_token_losses(model, probe[None].to(device), chunk_tokens=chunk_tokens)
            first_sum += losses[0, : passage_tokens - 1].double().sum().item()
            copy_sum += losses[0, copy_start:].double().sum().item()
            bar.update(probes.shape[1])
    scored = num_passages * (passage_tokens - 1)
    return RepeatProbe(
        num_passages=num_passages,
        passage_tokens=passage_tokens,
        gap_tokens=gap_tokens,
        first_perplexity=math.exp(first_sum / scored),
        copy_perplexity=math.exp(copy_sum / scored),
    )


def needle_tokens(
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_trials: int,
    context_tokens: int,
    distances: Sequence[int],
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What `needle_recall` puts into its prompts: int64 tokens of the question, of every statement and of every answer.

    Raises:
        ValueError: `distances` do not fit into prompts of `context_tokens`.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(10_000, 100_000, (num_trials,), generator=generator).tolist()

    def encode(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    question = encode(NEEDLE_QUESTION)
    statements = [encode(NEEDLE_STATEMENT.format(key=key)) for key in keys]
    answers = [encode(NEEDLE_ANSWER.format(key=key)) for key in keys]
    room = min(
        context_tokens - 1 - len(statement) - len(question) - len(answer)
        for statement, answer in zip(statements, answers, strict=True)
    )
    if not distances or min(distances) < 0 or max(distances) > room:
        raise ValueError(
            f"distances got {tuple(distances)} in prompts of {context_tokens} tokens; each must lie in 0..{room}, "
            "so that statement, question and answer fit; choose others or longer haystacks."
        )
    return question, statements, answers


def needle_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    haystacks: Tensor,
    *,
    distances: Sequence[int],
    seed: int = 0,
    label: str = "needle",
    progress: bool = True,
) -> NeedleRecall:
    """Passkey retrieval at several distances: "Landmark Attention", arXiv 2305.16300, section 4.3.

    Each prompt is a haystack in which `NEEDLE_STATEMENT`, with a random key of five digits, replaces
    as many tokens of text, `distance` tokens before `NEEDLE_QUESTION` and the answer at the end. A
    trial is recalled if every token of the answer is the most likely one given those before it, so
    if greedy decoding gives the answer. The control asks where the text was left as it was. A
    statement among the first tokens may lie in a layout's sinks: choose distances that keep away.

    Args:
        haystacks: int64 `[num_trials, context_tokens]`, text of the model's own kind.
        distances: tokens between the statement and the question, each 0 or more.
        seed: of the keys; the same keys at every distance.
    """
    _check_windows("haystacks", haystacks)
    num_trials, context = haystacks.shape
    device = next(model.parameters()).device
    distances = tuple(distances)
    question, statements, answers = needle_tokens(
        tokenizer, num_trials=num_trials, context_tokens=context, distances=distances, seed=seed
    )

    def ask(text: Tensor, answer: Tensor) -> tuple[bool, float]:
        prompt = torch.cat((text, question, answer))[None].to(device)
        hidden = model.base_model(input_ids=prompt, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[0, -1 - len(answer) : -1]).float()
        expected = answer.to(device)
        recalled = bool((logits.argmax(-1) == expected).all())
        return recalled, F.cross_entropy(logits, expected).item()

    found: dict[int | None, list[tuple[bool, float]]] = {key: [] for key in (None, *distances)}
    with (
        _evaluation_mode(model),
        tqdm(
            total=num_trials * len(found) * context,
            desc=label,
            unit="token",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        check_head(model, haystacks[:1].to(device))
        for haystack, statement, answer in zip(haystacks, statements, answers, strict=True):
            text = haystack[: context - len(question) - len(answer)]
            for distance, results in found.items():
                hidden_in = text
                if distance is not None:
                    end = len(text) - distance
                    hidden_in = torch.cat((text[: end - len(statement)], statement, text[end:]))
                results.append(ask(hidden_in, answer))
                bar.update(context)
    summed = {
        distance: (
            sum(recalled for recalled, _ in results),
            statistics.fmean(nll for _, nll in results),
        )
        for distance, results in found.items()
    }
    return NeedleRecall(
        num_trials=num_trials,
        context_tokens=context,
        distances=tuple(NeedleDistance(distance, *summed[distance]) for distance in distances),
        control_recalled=summed[None][0],
        control_nll_nats=summed[None][1],
    )


def _resident_bytes() -> tuple[int, int]:
    """Resident set of this process, now and at its peak."""
    if sys.platform == "linux":
        # Not getrusage: after fork and exec its peak starts at the parent's.
        fields = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    if sys.platform == "darwin":
        # The system offers only the peak, in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    raise NotImplementedError(
        f"device got cpu on {sys.platform}; the peak resident set is read on Linux and macOS only; "
        "measure there or on a GPU."
    )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Highest memory of this process until now in bytes, and what is counted, as `Cost.memory_kind` names it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda allocated"
    return _resident_bytes()[1], "process resident set"


def _forget_resident_peak() -> None:
    # Linux alone can; sandboxes without that file keep the earlier peak, an upper bound.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure_cost(
    function: Callable[[], object],
    *,
    device: torch.device,
    repetitions: int = 1,
    warmup: int = 1,
) -> Cost:
    """Time and peak memory of calls of `function`.

    Python's garbage collector runs between the calls, not inside of them, as in `timeit`: a full
    collection takes 0.3 s in a process that has imported transformers, and comes to a few calls only.

    On a GPU the memory is what torch's allocator handed out. On a CPU it is the resident set of the
    process, in which freed memory lingers and, where the system cannot reset it, an earlier peak
    stays: measure each setting in a process of its own (`in_fresh_process`).

    Args:
        repetitions: timed calls.
        warmup: calls before them, not timed, but counted for memory.
    """
    if repetitions < 1:
        raise ValueError(
            f"repetitions got {repetitions}; at least one call must be timed; use 1 or more."
        )
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"device got {device}; memory is measured on cpu and cuda; use one of them."
        )
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
    else:
        _forget_resident_peak()
        resting = _resident_bytes()[0]
    seconds = []
    for call in range(warmup + repetitions):
        with _garbage_collected_before():
            start = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize(device)
            stop = time.perf_counter()
        if call >= warmup:
            seconds.append(stop - start)
    peak, kind = peak_memory(device)
    return Cost(tuple(seconds), resting_bytes=resting, peak_bytes=peak, memory_kind=kind)


@contextmanager
def _garbage_collected_before() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def in_fresh_process(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Run `function` in a new process and return its result; an exception there is raised here.

    The process is forked from one that has imported what measurements need and done nothing else, so it
    starts in a second, without a GPU context, and with the environment variables of the first call (where
    the system cannot fork, it starts from nothing). The function must be importable (not a lambda), its
    arguments and result picklable. A process that the system ends, for memory for example, raises
    `concurrent.futures.process.BrokenProcessPool`.
    """
    prepare_fresh_processes()
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context(_start_method())) as pool:
        return pool.submit(function, *args, **kwargs).result()


def prepare_fresh_processes() -> None:
    """Begin, in the background, with the imports of which `in_fresh_process` makes use."""
    if _start_method() == "forkserver":
        from multiprocessing import forkserver

        get_context("forkserver").set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()


def _start_method() -> str:
    """Where nothing can be forked, on Windows, each process imports for itself."""
    return "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
