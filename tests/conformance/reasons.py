"""The cells of the matrix that are not "works", and why."""

from __future__ import annotations

import transformers
from conformance.matrix import Family, Feature
from conformance.verdict import NOT_APPLICABLE, REFUSED, WORKS
from packaging.version import Version

# (families, features) -> outcome, pattern of the reason. None: all of them.
_CELLS: list[tuple[set[str] | None, set[str] | None, tuple[str, str]]] = [
    ({"t5"}, {"packed_positions"}, (NOT_APPLICABLE, "takes no position_ids")),
    ({"t5"}, {"own_sliding_layers"}, (NOT_APPLICABLE, "does not mix")),
    ({"t5"}, None, (REFUSED, r"passes \['position_bias'\]")),
    (
        # Bidirectional masks, and the causal ones of OPT and gpt-oss, are made without position_ids; linear attention has none.
        {"bert", "roberta", "modernbert", "gpt_oss", "opt", "qwen3_next"},
        {"packed_positions"},
        (NOT_APPLICABLE, "transformers' eager attention is not equal"),
    ),
    (
        {"qwen3_next"},
        {"packed_lengths"},
        (NOT_APPLICABLE, "linear attention reads across documents"),
    ),
    ({"qwen3_next"}, {"assisted"}, (NOT_APPLICABLE, "transformers: .* stateful models")),
    ({"llama4"}, {"offloaded"}, (NOT_APPLICABLE, "transformers: .* meta tensor")),
    (
        {
            "bert",
            "deepseek_v2",
            "deepseek_v3",
            "gpt2",
            "gpt_neox",
            "llama",
            "llava",
            "olmo",
            "olmo2",
            "opt",
            "qwen3_next",
            "roberta",
            "smollm3",
        },
        {"sliding_cache"},
        (NOT_APPLICABLE, "no sliding windows"),
    ),
    (
        {
            "bert",
            "deepseek_v2",
            "deepseek_v3",
            "gpt2",
            "gpt_neox",
            "llama",
            "llava",
            "mistral",
            "mixtral",
            "olmo",
            "olmo2",
            "opt",
            "phi3",
            "qwen3_next",
            "roberta",
            "smollm3",
        },
        {"own_sliding_layers"},
        (NOT_APPLICABLE, "does not mix"),
    ),
]


# What transformers 5.17 cannot do, and 5.23 can.
_OLDER_CELLS: list[tuple[set[str], set[str], str]] = [
    ({"llama4"}, {"packed_positions"}, "transformers' eager attention is not equal"),
    (
        {"llava", "gemma3_vision"},
        {"prefill_chunk_size"},
        "transformers' eager attention is not equal",
    ),
    ({"gemma2", "gemma3_vision"}, {"assisted"}, "transformers: RuntimeError: The size of tensor a"),
]


def expected_cell(
    family: Family, feature: Feature, release: str = transformers.__version__
) -> tuple[str, str]:
    """Outcome and pattern of the reason with a release of transformers."""
    if family.kind not in feature.kinds:
        return (NOT_APPLICABLE, f"^{family.kind} model$")
    if Version(release) < Version("5.23"):
        for families, features, reason in _OLDER_CELLS:
            if family.name in families and feature.name in features:
                return (NOT_APPLICABLE, reason)
    for some_families, some_features, expected in _CELLS:
        is_family = some_families is None or family.name in some_families
        if is_family and (some_features is None or feature.name in some_features):
            return expected
    return (WORKS, "^$")
