"""Patched models under `torch.compile(fullgraph=True)`: one graph for all lengths, the numbers of eager, in every way people compile."""

import copy
import pickle

import pytest
import torch
from packaging.version import Version
from tiny_models import (
    LOGITS,
    assert_same,
    make_batch,
    make_model,
    real_tokens,
    run,
    spread_weights,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache, masking_utils

from hf_blocksparse import Dense, Sequences, SinkWindow, patch_model, sequences
from hf_blocksparse.transformers_masks import NamedMaskFunction, make_mask

CPU = torch.device("cpu")
LAYOUT = SinkWindow(2, 5)
# transformers has no other attention for them.
EAGER_ALONE = {"gemma2", "gpt_oss"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_holes(batch):
    batch["attention_mask"][2, 9:12] = 0
    return batch


def packed(batch):
    length = batch["input_ids"].shape[1]
    documents = torch.arange(length).remainder(11).expand(3, -1)
    return {"input_ids": batch["input_ids"], "position_ids": documents, "use_cache": False}


# How a batch of a length is made, padded or not.
WAYS = {
    "whole": lambda length: make_batch(length, padded=False),
    "padded": make_batch,
    "holes": lambda length: with_holes(make_batch(length)),
    "no cache": lambda length: make_batch(length, padded=False) | {"use_cache": False},
    "packed": lambda length: packed(make_batch(length, padded=False)),
}
WAYS_OF_FAMILY = {
    "llama": WAYS,
    "mistral": ("whole", "packed"),
    "gemma2": ("padded",),
    "gemma3": ("packed",),
    "gpt_oss": ("padded",),
    "llama4": ("padded",),
    "bert": ("padded",),
    "modernbert": ("padded",),
}


def check_as_eager(model, way, backend="eager", lengths=(20, 31)):
    """Logits and the gradient of every parameter, at several lengths, from two graphs: of the first length, and of all others."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in lengths:
        batch = WAYS[way](length)
        logits, gradients = run(compiled, batch)
        gradients = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
        assert_same((logits, gradients), run(model, batch))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family, ways in WAYS_OF_FAMILY.items() for way in ways],
)
def test_one_graph_for_all_lengths_that_trains_as_eager(family, way):
    model = patch_model(make_model(family, "eager" if family in EAGER_ALONE else "sdpa"), LAYOUT)
    check_as_eager(model, way)


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_one_graph_through_autograds_tracing(way):
    model = patch_model(make_model("llama", "sdpa"), LAYOUT)
    check_as_eager(model, way, "aot_eager", lengths=(20, 31, 43))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["padded", "packed"])
def test_one_graph_with_inductor(way):
    check_as_eager(patch_model(make_model("gemma3", "sdpa"), LAYOUT), way, "inductor")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("way", ["whole", "padded"])
def test_layers_without_a_layout_are_in_the_graph(implementation, way):
    model = patch_model(make_model("llama", implementation), {1: LAYOUT})
    check_as_eager(model, way)


def test_a_dense_layout_beside_a_sparse_one_is_in_the_graph():
    model = patch_model(make_model("gemma3", "sdpa"), {0: Dense(), 1: LAYOUT})
    check_as_eager(model, "padded")


def counting_backend():
    """A backend that runs graphs as they are, and a list of those it got. A function, as transformers copies its settings deeply."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def compile_everywhere(backend):
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    return config


@pytest.mark.parametrize(
    ("family", "layout", "padded"),
    [
        ("llama", LAYOUT, False),
        ("llama", LAYOUT, True),
        ("llama", {1: LAYOUT}, True),
        ("llama", Dense(), True),
        ("gemma2", LAYOUT, True),
        ("gpt_oss", LAYOUT, False),
    ],
)
def test_generation_with_a_static_cache_compiles_its_step(family, layout, padded):
    model = make_model(family, "eager" if family in EAGER_ALONE else "sdpa")
    batch = make_batch(7, padded=False)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :3] = 0
    options = dict(
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_scores=True,
    )
    num_graphs = 1
    if family in EAGER_ALONE:
        # transformers' cache of a window counts in Python, and its step is compiled anew for some counts.
        backend, graphs = counting_backend()
        model.generate(**batch, **options, compile_config=compile_everywhere(backend))
        num_graphs = len(graphs)
        torch._dynamo.reset()
    patch_model(model, layout)
    expected = model.generate(**batch, **options, disable_compile=True)
    backend, graphs = counting_backend()
    found = model.generate(**batch, **options, compile_config=compile_everywhere(backend))
    scores = (torch.stack(found.scores), torch.stack(expected.scores))
    torch.testing.assert_close(*scores, **LOGITS)
    assert len(graphs) == num_graphs


@pytest.mark.parametrize("padded", [False, True])
def test_steps_of_a_loop_with_a_static_cache_are_one_graph(padded):
    """As users write it: the whole model compiled, prefill too, and masks made in the graph."""
    model = patch_model(make_model("llama", "sdpa"), LAYOUT)
    batch = make_batch(18, padded=False)
    tokens = batch["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0

    def logits_of(forward):
        cache = StaticCache(config=model.config, max_cache_len=24)
        cache.early_initialization(3, 2, 8, torch.float32, CPU)
        found = []
        for start, stop in [(0, 12), *((i, i + 1) for i in range(12, 18))]:
            given = dict(attention_mask=mask[:, :stop]) if padded else {}
            out = forward(tokens[:, start:stop], past_key_values=cache, **given)
            found.append(out.logits[1:])
        return torch.cat(found, 1)

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected, whole = logits_of(model), model(tokens).logits[1:]
        found = logits_of(compiled)
    torch.testing.assert_close(found, expected, **LOGITS)
    torch.testing.assert_close(found, whole, **LOGITS)
    # Prefill and a step; where the mask that is given grows, a step for the first length and one for all others.
    assert counter.frame_count == (3 if padded else 2)


def own_4d_mask(batch, heads, length):
    return {"attention_mask": torch.ones(length, length).tril().bool().expand(batch, 1, -1, -1)}


@pytest.mark.parametrize(
    "call", [dict(output_attentions=True), own_4d_mask(3, 4, 30)], ids=["weights", "4-D mask"]
)
def test_what_a_trace_cannot_hold_breaks_the_graph_and_stays_right(call):
    model = patch_model(make_model("llama"), LAYOUT)
    tokens = make_batch(30, padded=False)["input_ids"]
    expected = model(input_ids=tokens, **call)
    reason = "a compiled graph cannot hold: a 4-D mask tensor"
    if Version(torch.__version__) < Version("2.12"):  # which takes it for an export
        reason = r"torch.export \(or fullgraph=True\) got a model with a 4-D mask tensor"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        torch.compile(model, fullgraph=True, backend="eager")(input_ids=tokens, **call)
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(input_ids=tokens, **call)
    torch.testing.assert_close(found.logits, expected.logits, **LOGITS)
    torch.testing.assert_close(found.attentions, expected.attentions)


@pytest.mark.parametrize("layout", [LAYOUT, {0: LAYOUT}], ids=["layout", "own attention"])
def test_a_graph_that_is_broken_for_one_layer_hands_its_mask_on(layout):
    """The mask made in the graph is read outside of it."""
    model = patch_model(make_model("llama", "sdpa"), layout)
    batch = make_batch(30)
    expected = model(**batch).logits[real_tokens(batch)]
    layer = model.model.layers[1].self_attn
    layer.forward = torch.compiler.disable(layer.forward)
    found = torch.compile(model, backend="eager")(**batch).logits[real_tokens(batch)]
    torch.testing.assert_close(found, expected, **LOGITS)


def test_gradient_checkpointing_is_in_the_graph():
    model = patch_model(make_model("llama", "sdpa"), LAYOUT).train()
    plain = run(model, make_batch(20))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    logits, gradients = run(compiled, make_batch(20), use_cache=False)
    gradients = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
    assert_same((logits, gradients), plain)


def describe(batch, query_len, *, attention_mask=None, documents=None):
    return torch.ops.hf_blocksparse.describe_sequences(
        attention_mask, documents, None, batch, query_len, query_len, 0, 0, CPU
    )


def test_sequences_are_found_again_by_their_facts_or_made_of_the_table():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    table, facts, _ = describe(2, 12, attention_mask=mask)
    first, has_mask = Sequences.of_graph(table, facts, 2, 12, 12)
    assert Sequences.of_graph(table, facts, 2, 12, 12)[0] is first and not has_mask
    for _ in range(sequences.REMEMBERED_FACTS):
        describe(2, 12, attention_mask=mask)
    made, _ = Sequences.of_graph(table, facts, 2, 12, 12)
    assert made is not first and made.is_transient
    for name in ("table", "query_begin", "query_end", "key_end", "covers_queries", "covers_keys"):
        one, other = getattr(made, name), getattr(first, name)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name


def test_documents_are_as_many_as_there_are():
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    table, facts, holes = describe(2, 5, documents=documents)
    found, has_mask = Sequences.of_graph(table, facts, 2, 5, 5)
    assert table.shape == (10, 7) and found.num_sequences == 3 and not has_mask
    assert torch.equal(found.table, Sequences.from_document_ids(documents).table)
    assert holes.numel() == 0


def test_the_operators_keep_torchs_contract():
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 3:5] = False
    # Serial numbers differ from call to call, so the results of two runs are not compared.
    torch.library.opcheck(
        torch.ops.hf_blocksparse.describe_sequences.default,
        (mask, None, None, 2, 12, 12, 0, 0, CPU),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_wrong_mask_raises_as_in_eager():
    model = patch_model(make_model("llama", "sdpa"), LAYOUT)
    tokens = make_batch(12, padded=False)["input_ids"]
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"attention_mask got shape \(1, 12\)"):
        compiled(tokens, attention_mask=torch.ones(1, 12))


MAKERS = {
    "and_masks": lambda own: own.and_masks(own.causal_mask_function, own.sliding_window_overlay(3)),
    "or_masks": lambda own: own.or_masks(own.causal_mask_function, own.sliding_window_overlay(3)),
    "sliding": lambda own: own.sliding_window_causal_mask_function(3),
    "bidirectional": lambda own: own.sliding_window_bidirectional_mask_function(3),
    "chunked": lambda own: own.chunked_causal_mask_function(4, torch.tensor([2, 0])),
    "packed": lambda own: own.packed_sequence_mask_function(torch.arange(10).expand(2, -1) // 4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_named_mask_functions_are_transformers_own(name):
    function = MAKERS[name](masking_utils)
    assert isinstance(function, NamedMaskFunction)
    row = torch.arange(10)
    places = (torch.arange(2)[:, None, None, None], torch.arange(1)[:, None, None])
    expected = function.function(*places, row[:, None], row).expand(2, 1, 10, 10)
    for use_vmap in (False, True):
        mask = masking_utils.sdpa_mask(
            2, 10, 10, mask_function=function, use_vmap=use_vmap, allow_is_causal_skip=False
        )
        assert torch.equal(mask, expected)


def test_makers_called_by_keyword_are_left_alone():
    function = masking_utils.sliding_window_overlay(sliding_window=3)
    assert not isinstance(function, NamedMaskFunction)
    mask = make_mask(1, 6, 6, mask_function=function)
    assert mask.dense is not None and mask.dense[0, 0, 5].tolist() == [False] * 3 + [True] * 3


def test_other_models_compile_as_before():
    """Their masks are made of the same functions."""
    model = make_model("gemma3", "sdpa")
    batch = packed(make_batch(20, padded=False))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **LOGITS)


def test_a_patched_model_can_be_copied_and_pickled():
    model = patch_model(make_model("llama", "sdpa"), {1: LAYOUT})
    batch = make_batch(12)
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, expected)


class WithPrefix(nn.Module):
    """Makes its mask itself, with a function of its own: the first tokens read each other both ways."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden, attention_mask, position_embeddings):
        def prefix(batch_idx, head_idx, q_idx, kv_idx):
            return (q_idx < 4) & (kv_idx < 4)

        mask = masking_utils.create_causal_mask(
            self.model.config, hidden, attention_mask, None, None, or_mask_function=prefix
        )
        layer = self.model.model.layers[0]
        return layer(hidden, attention_mask=mask, position_embeddings=position_embeddings)


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_function_of_a_models_own_is_in_the_graph(padded):
    model = patch_model(make_model("llama", "sdpa"), LAYOUT)
    layer = WithPrefix(model)
    hidden = torch.randn(3, 12, 32)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, 8:] = 0
    mask = mask if padded else None
    embeddings = model.model.rotary_emb(hidden, torch.arange(12)[None])
    expected = layer(hidden, mask, embeddings)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, mask, embeddings), expected, **LOGITS)


class FirstLayer(nn.Module):
    """Compiled alone, it gets a mask that was made outside of its graph."""

    def __init__(self, model):
        super().__init__()
        self.layer = model.model.layers[0]

    def forward(self, hidden, mask, position_embeddings):
        # Some families (Whisper) hand the flag on when it is off.
        return self.layer(
            hidden,
            attention_mask=mask,
            position_embeddings=position_embeddings,
            output_attentions=False,
        )


def test_a_layer_compiled_alone_takes_a_mask_from_outside():
    model = patch_model(make_model("llama", "sdpa"), LAYOUT)
    layer = FirstLayer(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (16, 25):
        batch = make_batch(length)
        hidden = torch.randn(3, length, 32)
        embeddings = model.model.rotary_emb(hidden, torch.arange(length)[None])
        mask = masking_utils.create_causal_mask(
            model.config, hidden, batch["attention_mask"], None, None
        )
        found = compiled(hidden, mask, embeddings)
        torch.testing.assert_close(found, layer(hidden, mask, embeddings), **LOGITS)
    assert counter.frame_count == 2


@pytest.fixture(scope="module")
def gpu_model():
    """Heads of a size that the GPU's kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = spread_weights(LlamaForCausalLM(config).eval()).to("cuda", torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    return patch_model(model, SinkWindow(4, 100))


def assert_as_accurate(found, eager, exact):
    """Against float32, compiled errs at most twice as much as eager, or by one rounding."""
    found, eager = (((one.float() - exact).norm() / exact.norm()).item() for one in (found, eager))
    assert found <= max(2 * eager, 2**-8), (found, eager)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "padded", "packed"])
def test_inductor_on_a_gpu_trains_as_eager(gpu_model, way):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(gpu_model, fullgraph=True, backend=counter)
    in_float32 = copy.deepcopy(gpu_model).float()
    for length in (300, 421):
        batch = WAYS[way](length)
        batch = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        results = [run(model, batch) for model in (compiled, gpu_model, in_float32)]
        assert_as_accurate(*(logits for logits, _ in results))
        found, eager, exact = (gradients for _, gradients in results)
        for name, gradient in exact.items():
            assert_as_accurate(found["_orig_mod." + name], eager[name], gradient)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.slow
def test_a_step_with_a_static_cache_is_a_cuda_graph(gpu_model):
    tokens = make_batch(200, padded=False)["input_ids"].cuda()
    counters["inductor"].clear()
    step = torch.compile(gpu_model, fullgraph=True, mode="reduce-overhead")

    @torch.no_grad()  # entered and left at each step: three of them take turns
    def logits_of(model, forward):
        cache = StaticCache(config=model.config, max_cache_len=256)
        model(tokens[:, :180], past_key_values=cache)
        for place in range(180, 200):
            torch.compiler.cudagraph_mark_step_begin()
            out = forward(tokens[:, place : place + 1], past_key_values=cache)
            yield out.logits.clone()

    in_float32 = copy.deepcopy(gpu_model).float()
    forwards = ((gpu_model, step), (gpu_model, gpu_model), (in_float32, in_float32))
    for found, eager, exact in zip(*(logits_of(*one) for one in forwards), strict=True):
        assert_as_accurate(found, eager, exact)
    assert counters["inductor"]["cudagraph_skips"] == 0


def mask_of(batch, sequences):
    """The attention mask of a batch and the tokens generated after it."""
    rows, length = batch["input_ids"].shape
    added = batch["attention_mask"].new_ones(rows, sequences.shape[1] - length)
    return torch.cat((batch["attention_mask"], added), 1)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_generation_on_a_gpu_with_transformers_own_compilation(gpu_model, padded):
    batch = {"input_ids": make_batch(150, padded=False)["input_ids"].cuda()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if padded:
        batch["attention_mask"][0, :40] = 0
    options = dict(
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = gpu_model.generate(**batch, **options, disable_compile=True)
    found = gpu_model.generate(**batch, **options)
    exact = copy.deepcopy(gpu_model).float()
    # One rounding may choose another token, after which texts differ; these are the steps with equal texts before them.
    same = (found.sequences == expected.sequences).all(0).long().cumprod(0).sum().item() - 150
    assert same >= 4
    whole = exact(found.sequences, attention_mask=mask_of(batch, found.sequences)).logits
    for place in range(min(same, 11)):
        scores = (found.scores[place], expected.scores[place])
        assert_as_accurate(*scores, whole[:, 149 + place])
