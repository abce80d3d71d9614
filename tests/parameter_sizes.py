"""Sizes of a compiled kernel's parameters: as the package lays them out for the driver, and as its PTX declares them."""

import re
from typing import Any
from unittest import mock

from hf_blocksparse.ops.triton import argument_block
from hf_blocksparse.ops.triton.argument_block import MAP_BYTES, Address, Map, fields_of


def argument_like(kind: Any) -> Any:
    """Any argument of a type in Triton's signature."""
    if isinstance(kind, tuple):
        return tuple(map(argument_like, kind))
    if kind.startswith("*"):
        return Address(0)
    if kind.startswith("tensordesc"):
        rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
        return Map(Address(0), (1,) * rank, (1,) * rank, "zero", 0)
    return 1.0 if kind.startswith("f") else 1


def sizes_laid_out(compiled: Any) -> list[int]:
    arguments = argument_like(tuple(compiled.src.signature.values()))
    # There is no driver to encode tensor maps.
    with mock.patch.object(argument_block, "encode", lambda *facts: bytes(MAP_BYTES)):
        return [field.size for field in fields_of(compiled, arguments)]


def sizes_in_ptx(compiled: Any) -> list[int]:
    declared = re.search(r"\.entry \w+\((.*?)\n\)", compiled.asm["ptx"], re.DOTALL)[1]
    pattern = r"\.param (?:\.align \d+ )?\.[a-z](\d+)(?: [^\[,\n]*)?(?:\[(\d+)\])?"
    found = re.findall(pattern, declared)
    assert len(found) == declared.count(".param"), declared
    return [int(bits) // 8 * int(number or 1) for bits, number in found]
