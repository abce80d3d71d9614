"""The cells of the matrix that are not "works", and why."""

from __future__ import annotations

from conformance.matrix import Family, Feature

WORKS = ("works", "^$")

# (families, features) -> outcome, pattern of the reason. None: all of them.
_CELLS: list[tuple[set[str] | None, set[str] | None, tuple[str, str]]] = [
    ({"t5"}, {"packed_positions"}, ("not applicable", "takes no position_ids")),
    ({"t5"}, {"own_sliding_layers"}, ("not applicable", "does not mix")),
    ({"t5"}, None, ("refused", r"passes \['position_bias'\]")),
    (
        # Bidirectional masks, and the causal ones of OPT and gpt-oss, are made without position_ids; linear attention has none.
        {"bert", "roberta", "modernbert", "gpt_oss", "opt", "qwen3_next"},
        {"packed_positions"},
        ("not applicable", "transformers' eager attention is not equal"),
    ),
    ({"qwen3_next"}, {"packed_lengths"}, ("not applicable", "transformers: .* can't keep packed")),
    ({"qwen3_next"}, {"assisted"}, ("not applicable", "transformers: .* stateful models")),
    ({"llama4"}, {"offloaded"}, ("not applicable", "transformers: .* meta tensor")),
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
        ("not applicable", "no sliding windows"),
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
        ("not applicable", "does not mix"),
    ),
]


def expected_cell(family: Family, feature: Feature) -> tuple[str, str]:
    """Outcome and pattern of the reason."""
    if family.kind not in feature.kinds:
        return ("not applicable", f"^{family.kind} model$")
    for families, features, expected in _CELLS:
        if (families is None or family.name in families) and (
            features is None or feature.name in features
        ):
            return expected
    return WORKS
