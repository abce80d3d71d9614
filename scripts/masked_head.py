"""Train a masked-token head, and the encoder under it, at the encoder's own length."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_cost import autocast
from evaluation_results import TrainingRun
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import trange
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_blocksparse.evaluation import peak_memory

LOGGED_EVERY = 50
# Shares of the steps: those in which the body rests while the new head finds its way, and those in
# which its learning rate then rises.
RESTING, RISING = 0.1, 0.1
# SDPA without any mask: while a graph is recorded, transformers would make one of full texts, too.
UNMASKED = "unmasked"


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained.

    Attributes:
        steps, rows: optimizer steps, and texts read in each.
        learning_rate: the highest, of head and body.
        hidden_share: of the tokens of every text.
    """

    steps: int
    rows: int
    learning_rate: float
    hidden_share: float
    adam_betas: tuple[float, float]
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float
    seed: int


def train_head(
    model: PreTrainedModel,
    texts: Tensor,
    settings: HeadTraining,
    *,
    first: int,
    mask: int,
    dtype: torch.dtype,
    name: str,
    graph: bool,
) -> TrainingRun:
    """Train all weights of `model`, in place.

    The first tenth of the steps changes the new head alone. Texts are drawn at random and other tokens
    hidden in each step, as BERT's were (arXiv 1810.04805): of those chosen 8 of 10 become `mask`, one
    any token, and one stays. Logits are computed for the hidden tokens alone.

    Args:
        model: transformers' masked-token model, with its weights in float32.
        texts: int64 `[texts, length]`, without the special token `first`.
        dtype: what is computed in.
        name: of the training in the record.
        graph: record a step as a CUDA graph once and replay it, as issuing its kernels takes longer than
            they do.
    """
    device = model.device
    torch.manual_seed(settings.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    texts = texts.to(device)
    count = max(1, round(settings.hidden_share * texts.shape[1]))
    body = list(model.base_model.parameters())  # with tied embeddings the output embedding, too
    known = {id(parameter) for parameter in body}
    head = [parameter for parameter in model.parameters() if id(parameter) not in known]
    rates = [torch.zeros((), device=device) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": head, "lr": rates[0]}, {"params": body, "lr": rates[1]}],
        betas=settings.adam_betas,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )
    total = torch.zeros((), device=device)
    asked: list[Tensor] = []

    def keep_asked(module: nn.Module, arguments: object, output: object) -> object:
        states = output.last_hidden_state
        output.last_hidden_state = states.take_along_dim(asked[0][..., None], 1)
        return output

    def step() -> None:
        text = texts[torch.randint(len(texts), (settings.rows,), device=device)]
        hidden = torch.rand(text.shape, device=device).topk(count, 1).indices
        labels = text.gather(1, hidden)
        fate = torch.rand(hidden.shape, device=device)
        any_token = torch.randint(model.config.vocab_size, hidden.shape, device=device)
        shown = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, any_token, labels))
        front = torch.full_like(text[:, :1], first)
        asked[:] = [hidden + 1]
        with autocast(device, dtype):
            inputs = torch.cat((front, text.scatter(1, hidden, shown)), 1)
            loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        total.add_(loss.detach())

    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, lambda *sizes, **options: None)
    attention = model.config._attn_implementation
    model.set_attn_implementation(UNMASKED)
    model.train()
    hook = model.base_model.register_forward_hook(keep_asked)
    replay = _recorded(step) if graph else step
    total.zero_()
    steps, losses, speeds, peaks = [], [], [], []
    start, since = time.perf_counter(), 0
    bar = trange(settings.steps, desc=f"  {name}")
    for number in bar:
        share = number / settings.steps
        for rate, rest in zip(rates, (0.0, RESTING), strict=True):
            rise = min(1.0, max(0.0, share - rest + 1 / settings.steps) / RISING)
            rate.fill_(settings.learning_rate * rise * (1 - share) if share >= rest else 0.0)
        replay()
        since += 1
        if since == LOGGED_EVERY or number + 1 == settings.steps:
            losses.append(total.item() / since)  # waits for the device
            seconds = time.perf_counter() - start
            steps.append(number + 1)
            speeds.append(since * settings.rows * (texts.shape[1] + 1) / seconds)
            peaks.append(peak_memory(device)[0])
            bar.set_postfix_str(f"loss {losses[-1]:.3f}, {speeds[-1]:,.0f} tokens/s")
            total.zero_()
            start, since = time.perf_counter(), 0
    hook.remove()
    model.set_attn_implementation(attention)
    model.zero_grad(set_to_none=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TrainingRun(
        attention=name,
        logged_steps=tuple(steps),
        losses_nats=tuple(losses),
        tokens_per_second=tuple(speeds),
        peak_bytes=tuple(peaks),
        memory_kind=peak_memory(device)[1],
        tokens_per_step=settings.rows * (texts.shape[1] + 1),
        num_processes=1,
        trained_parameters=parameters,
        all_parameters=parameters,
        resumed_at=(),
    )


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """The same as a CUDA graph; its first calls happen here, with learning rates of zero."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
