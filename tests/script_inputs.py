"""A tiny model with a byte tokenizer, and text for it, in folders, as the scripts read them."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer():
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_model(folder: Path, **options) -> Path:
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes | heads | dict(max_position_embeddings=256) | options)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path, words: int = 90) -> Path:
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for number in range(12):
        text = " ".join(draw.choice(("sparse", "tiles", "keep", "few")) for _ in range(words))
        (folder / f"{number:02d}.txt").write_text(f"{number:02d} {text}")
    (folder / "short.txt").write_text("too short for a window")
    return folder
