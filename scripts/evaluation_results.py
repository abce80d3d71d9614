"""What `evaluate.py` and `finetune.py` record; their model cards and figures are made from this alone."""

from dataclasses import dataclass

from sparsify_results import CostRow, LayoutFacts, ModelFacts, TextFacts

from hf_blocksparse.evaluation import NeedleRecall, NllDifference, Perplexity, RepeatProbe

DENSE, LAYOUT, SAME_BUDGET = "dense", "layout", "same budget"
# Weights that were not trained here: those a fine-tuning started from, those an evaluation was given.
PRETRAINED, GIVEN = "pretrained", "given"


@dataclass(frozen=True)
class AttentionFacts:
    """One attention that was measured.

    Attributes:
        name: as in the rows, unique.
        role: "dense", "layout" (one that was asked for) or "same budget" (the plain sliding window with
            as many coefficients as a layout).
        facts: the layout; None for dense attention.
    """

    name: str
    role: str
    facts: LayoutFacts | None

    @property
    def density(self) -> float:
        return 1.0 if self.facts is None else self.facts.density


@dataclass(frozen=True)
class QualityRow:
    """Some weights with some attention.

    Attributes:
        weights: "pretrained", "given", or the name of the attention they were fine-tuned with.
        attention: name of the attention they were measured with.
        read_tokens: tokens of each window that were read; fewer than the context where it was cut.
        perplexity: on the held-out windows.
        difference: to the same weights with dense attention; of trained weights to those trained dense, or
            to the pretrained ones where none were. None for that row itself.
        repeats: the repeat probe at several gaps.
        needle: passkey retrieval.
    """

    weights: str
    attention: str
    read_tokens: int
    perplexity: Perplexity
    difference: NllDifference | None
    repeats: tuple[RepeatProbe, ...]
    needle: NeedleRecall | None


@dataclass(frozen=True)
class LengthCost:
    """A row of costs at one length."""

    tokens: int
    row: CostRow


@dataclass(frozen=True)
class TrainingRun:
    """One fine-tuning.

    Attributes:
        attention: name of the attention it was made with.
        logged_steps: the steps at which the numbers below were logged; each stands for the steps since
            the one before.
        losses_nats: mean training loss.
        tokens_per_second: over all processes, of the steps alone: reading and saving are not counted.
        peak_bytes: highest memory of the first process until then, since it was started.
        memory_kind: what `peak_bytes` counts, as in `Cost`.
        tokens_per_step: over all processes.
        num_processes: processes at the end.
        trained_parameters, all_parameters: how many of how many weights were trained.
        resumed_at: steps at which the run was taken up again.
    """

    attention: str
    logged_steps: tuple[int, ...]
    losses_nats: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    memory_kind: str
    tokens_per_step: int
    num_processes: int
    trained_parameters: int
    all_parameters: int
    resumed_at: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return self.logged_steps[-1]


@dataclass(frozen=True)
class EvaluationResults:
    """
    Attributes:
        name: of the result.
        context_tokens, scored_tokens: tokens of every window, and how many at its end are the headline.
        attentions: everything measured, dense first.
        qualities, costs: what was measured.
        trainings: empty for `evaluate.py`.
    """

    name: str
    context_tokens: int
    scored_tokens: int
    model: ModelFacts
    text: TextFacts
    attentions: tuple[AttentionFacts, ...]
    qualities: tuple[QualityRow, ...]
    costs: tuple[LengthCost, ...]
    trainings: tuple[TrainingRun, ...]

    def attention(self, name: str) -> AttentionFacts:
        return next(attention for attention in self.attentions if attention.name == name)

    def row(
        self, weights: str, attention: str, read_tokens: int | None = None
    ) -> QualityRow | None:
        """The row of these weights with this attention; of whole windows if `read_tokens` is None."""
        read_tokens = read_tokens or self.context_tokens
        wanted = (weights, attention, read_tokens)
        for row in self.qualities:
            if (row.weights, row.attention, row.read_tokens) == wanted:
                return row
        return None


def kept_gain(results: EvaluationResults, row: QualityRow, cut_tokens: int) -> float | None:
    """Share of what dense attention gains from the whole context that `row` keeps.

    The gain is the loss of dense attention cut to its last `cut_tokens` less its loss with the whole
    context, in nats; dense weights are those trained alike where there are any. None where one of the
    three was not measured or dense gains nothing.
    """
    weights = row.weights if row.weights in (PRETRAINED, GIVEN) else DENSE
    dense, cut = results.row(weights, DENSE), results.row(weights, DENSE, cut_tokens)
    if dense is None or cut is None:
        return None
    without = cut.perplexity.buckets[-1].nll_nats
    gain = without - dense.perplexity.buckets[-1].nll_nats
    return (without - row.perplexity.buckets[-1].nll_nats) / gain if gain > 0 else None
