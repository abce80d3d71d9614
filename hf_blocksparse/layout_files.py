"""Tensor and mask layouts too large for JSON, in a safetensors file beside it.

In memory a section is always whole: its tables are base64 text. On disk a table of more than `INLINE_BYTES` of text stands in the file
`TENSORS_FILE` as its bits, one uint8 tensor, and the section names it,

    {"kind": "tensor", "block_size": 64, "shape": [32, 512, 512], "data": {"file": ..., "tensor": ..., "sha256": ...}}

where the bits are those of the table in order, eight to a byte, the lowest first. Equal tables are stored once. Reading checks the
hash, and nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS_FILE = "block_sparse_layouts.safetensors"
# Of base64 text in one table: as much as 443 x 443 entries drawn at random, which do not compress.
INLINE_BYTES = 32_768

_TABLE_KINDS = ("tensor", "mask")


def _with_tables(value: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """A copy of JSON data in which every table layout's `data` is replaced by `change(layout)`."""
    if isinstance(value, Mapping):
        copied = {key: _with_tables(child, change) for key, child in value.items()}
        if copied.get("kind") in _TABLE_KINDS and "data" in copied:
            copied["data"] = change(copied)
        return copied
    if isinstance(value, list | tuple):
        return [_with_tables(child, change) for child in value]
    return value


def move_tables_out(
    section: Mapping[str, Any], tensors: dict[str, Tensor], file: str = TENSORS_FILE
) -> dict[str, Any]:
    """`section` with references to `file` for its large tables, whose bits are added to `tensors`."""

    def move(layout: dict[str, Any]) -> Any:
        data = layout["data"]
        if not isinstance(data, str) or len(data) <= INLINE_BYTES:
            return data
        bits = zlib.decompress(base64.b64decode(data))
        digest = hashlib.sha256(bits).hexdigest()
        name = digest[:16]
        tensors[name] = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
        return {"file": file, "tensor": name, "sha256": digest}

    return _with_tables(section, move)


def write_tables(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the tables of one JSON file to `path`, or remove those of an earlier save there."""
    if tensors:
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.unlink(missing_ok=True)


def read_tables(value: Mapping[str, Any], find: Callable[[str], str | None]) -> dict[str, Any]:
    """`value`, any JSON data with layouts in it, with the tables that it refers to put back.

    Args:
        find: the local path of a file beside the JSON, None if there is none.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a reference or the file's content is not what was written.
    """
    find = functools.cache(find)

    def read(layout: dict[str, Any]) -> Any:
        data = layout["data"]
        return _read_table(data, find) if isinstance(data, Mapping) else data

    return _with_tables(value, read)


def _read_table(reference: Mapping[str, Any], find: Callable[[str], str | None]) -> str:
    from safetensors import SafetensorError, safe_open

    fields = ("file", "sha256", "tensor")
    file, digest, name = (reference.get(field) for field in fields)
    is_beside = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
    if set(reference) != set(fields) or not is_beside:
        raise ValueError(
            f"layout got data {dict(reference)!r}; it must hold {list(fields)}, with the name of a safetensors file beside it; correct it, "
            "or upgrade hf-blocksparse if a newer release wrote it."
        )
    path = find(file)
    if path is None:
        raise FileNotFoundError(
            f"layout got the tensor {name!r} of {file}, which is missing; a checkpoint with large tensor layouts needs that file beside "
            "its JSON; copy it, too, or save the model again."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            bits = tensors.get_tensor(name).numpy().tobytes()
    except SafetensorError as error:
        raise ValueError(
            f"layout got the tensor {name!r} of {file}, which cannot be read ({error}); both files must come from one save; "
            "copy them again."
        ) from error
    found = hashlib.sha256(bits).hexdigest()
    if found != digest:
        raise ValueError(
            f"layout got the tensor {name!r} of {file} with sha256 {found}; {digest!r} was saved; the file is damaged or of another save; "
            "copy both again."
        )
    return base64.b64encode(zlib.compress(bits, 6)).decode("ascii")


def refers_to_tables(value: Mapping[str, Any]) -> bool:
    """Whether JSON data holds layouts whose tables stand in a file."""
    found = []
    _with_tables(value, lambda layout: found.append(isinstance(layout["data"], Mapping)))
    return any(found)


def find_beside(source: str, options: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Finds files beside the configuration that transformers loads from `source` with these options of `from_pretrained`.

    Args:
        source: a folder, a file in one, or a hub id.
        options: of which those that say where on the hub and in its cache are used.
    """
    from transformers.utils import cached_file

    used = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    where = {key: options[key] for key in used if options.get(key) is not None}
    folder = str(Path(source).parent) if Path(source).is_file() else source

    def find(name: str) -> str | None:
        if Path(folder).is_absolute() and not Path(folder).exists():
            return None  # no hub id either; what is loaded from there says so
        return cached_file(
            folder,
            name,
            subfolder=options.get("subfolder") or "",
            _raise_exceptions_for_missing_entries=False,
            **where,
        )

    return find


@contextlib.contextmanager
def tables_beside(owners: Iterable[dict[str, Any]], key: str, folder: Path) -> Iterator[None]:
    """Inside, the sections at `owner[key]` refer to the tables file, which is written to `folder` first."""
    kept = [(owner, owner[key]) for owner in owners if owner.get(key) is not None]
    tensors: dict[str, Tensor] = {}
    moved = [move_tables_out(section, tensors) for _, section in kept]
    write_tables(tensors, folder / TENSORS_FILE)
    try:
        for (owner, _), section in zip(kept, moved, strict=True):
            owner[key] = section
        yield
    finally:
        for owner, section in kept:
            owner[key] = section
