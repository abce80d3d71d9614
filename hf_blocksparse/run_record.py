"""The record of a run: one JSON with the resolved arguments, the environment and the results.

Cards and figures are made from these files alone, so reading is strict: a missing key, an unknown
    key, a value of another type or a record of another version raises ValueError and names the
    place in the file.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

Record = TypeVar("Record")

FORMAT_VERSION = 1
PACKAGES = (
    "hf-blocksparse",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
)


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made.

    Attributes:
        device: "cpu" or the GPU's name.
        device_memory_bytes: memory of the GPU, or of the machine.
        cpu_threads: threads torch computes with.
        packages: installed versions; packages that are not installed are left out.
        git_commit: of the source tree the package was imported from; None outside a git checkout.
        git_changed: whether tracked files differed from that commit; None outside a git checkout.
        started_at: UTC, ISO 8601.
    """

    device: str
    device_memory_bytes: int
    processor: str
    cpu_threads: int
    platform: str
    python: str
    packages: dict[str, str]
    git_commit: str | None
    git_changed: bool | None
    started_at: str


@dataclass(frozen=True)
class RunRecord:
    """One run of one script.

    Attributes:
        script: file name of the script.
        arguments: every argument as resolved, presets included.
        timings_seconds: wall time by phase.
        results: the script's own results, see `to_plain` and `from_plain`.
    """

    version: int
    script: str
    arguments: dict[str, Any]
    seed: int
    environment: Environment
    timings_seconds: dict[str, float]
    results: dict[str, Any]


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ("git", "-C", str(Path(__file__).parent), *arguments),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_environment(device: torch.device) -> Environment:
    """The environment of a run on `device`, now."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = device.type, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    return Environment(
        device=name,
        device_memory_bytes=memory,
        processor=_processor(),
        cpu_threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=packages,
        git_commit=commit,
        git_changed=None
        if commit is None
        else bool(_git("status", "--porcelain", "--untracked-files=no")),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as dicts and lists of JSON values. Floats must be finite,
    keys strings.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        if unfit := [key for key in value if not isinstance(key, str)]:
            raise TypeError(
                f"value got the keys {unfit}; JSON keys must be strings; convert them, so that "
                "reading gives them back."
            )
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"value got {value}; a record holds finite numbers; find out why it is not, and "
                "record that."
            )
        return value
    raise TypeError(
        f"value got a {type(value).__name__}; a record holds dataclasses, dicts, lists, strings, "
        "numbers, bools and None; "
        "convert it."
    )


def _unfit(place: str, value: object, expected: str) -> ValueError:
    return ValueError(
        f"record got {value!r} at {place}; it must be {expected}; write the record anew with this "
        "release."
    )


def from_plain(kind: type[Record], value: Any, place: str = "record") -> Record:
    """Rebuild a dataclass from what `to_plain` made of it; the types of its fields are checked, at
    every depth.
    """
    return _read(kind, value, place)


def _read(kind: Any, value: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (only,) = [argument for argument in arguments if argument is not type(None)]
        return _read(only, value, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise _unfit(place, value, "a list")
        return tuple(_read(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _unfit(place, value, "an object")
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise _unfit(place, value, "an object")
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        if missing := sorted(names - set(value)):
            raise _unfit(place, sorted(value), f"an object with the keys {missing}, too")
        if unknown := sorted(set(value) - names):
            raise _unfit(place, unknown, f"an object with only the keys {sorted(names)}")
        return kind(**{name: _read(hints[name], value[name], f"{place}.{name}") for name in names})
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise _unfit(place, value, f"of type {kind.__name__}")
    return value


def write_record(record: RunRecord, path: Path) -> None:
    """Write the record as JSON, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(to_plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_record(path: Path) -> RunRecord:
    """Read what `write_record` wrote; anything else raises ValueError that names the file and the
    place.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"path got {path}, which is not JSON ({error}); it must be a file that write_record "
            "wrote; run the script again."
        ) from error
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"path got {path} with version {version!r}; this release reads version "
            f"{FORMAT_VERSION}; "
            "run the script again, or read it with the release that wrote it."
        )
    return from_plain(RunRecord, plain, str(path))
