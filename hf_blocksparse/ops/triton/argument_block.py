"""Kernels whose arguments lie ready in memory as the CUDA driver reads them, so that starting them again takes their addresses alone.

Triton's launcher is given every argument in every call: it takes some fifty Python objects apart and encodes each tensor map anew, which
takes longer than the driver does. The launches of a recording differ from those before in nothing but addresses, so everything else is
written once. This module knows what Triton's launcher hands the driver, which is the same in the versions named here, and compares it with
what the driver says about the compiled kernel. Whatever is not known to be the same raises Unsuited, and is left to Triton's launcher.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

FIRST_TRITON, BEFORE_TRITON = (3, 6), (3, 10)
MAP_BYTES = 128
MAP_ALIGNMENT = 64
FIELD_BYTES = 8
MOST_SHARED_BYTES = 228 * 1024
"""Above it Triton sets an attribute of the launch."""

# What is packed into a field, and how many bytes of it the kernel reads.
_SCALARS = {
    "i1": ("b", 1), "i8": ("b", 1), "i16": ("h", 2), "i32": ("i", 4), "i64": ("q", 8),
    "u1": ("B", 1), "u8": ("B", 1), "u16": ("H", 2), "u32": ("I", 4), "u64": ("Q", 8),
    "fp32": ("f", 4), "f32": ("f", 4), "fp64": ("d", 8),
}  # fmt: skip


class Unsuited(Exception):
    """Why a launch is left to Triton's launcher."""


class Address(NamedTuple):
    """The address `skipped_bytes` after that of the tensor numbered `slot`."""

    slot: int
    skipped_bytes: int = 0


class Map(NamedTuple):
    """A tensor map of all of the tensor at `place`, as a descriptor says it; `address`: any that the tensor had."""

    place: Address
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    address: int


class Field(NamedTuple):
    """A parameter of a kernel: its size, and a packed constant, an address or an encoded map."""

    size: int
    value: bytes | Address | tuple[Address, bytes]


class LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


@cache
def _driver() -> Any:
    """The CUDA driver's library, with the functions used here."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unsuited("the CUDA driver's library is not found") from error
    address, size = ctypes.c_void_p, ctypes.c_size_t
    signatures = {
        "cuLaunchKernelEx": (address, address, address, address),
        "cuTensorMapReplaceAddress": (address, address),
        "cuTensorMapEncodeTiled": (
            address, ctypes.c_int, ctypes.c_uint, address, address, address, address, address,
            ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        ),
        "cuFuncGetParamInfo": (address, size, address, address),
        "cuGetErrorName": (ctypes.c_int, address),
    }  # fmt: skip
    for name, types in signatures.items():
        try:
            function = getattr(driver, name)
        except AttributeError as error:
            raise Unsuited(f"the driver has no {name}") from error
        function.argtypes, function.restype = types, ctypes.c_int
    return driver


def _check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        said = "unknown error" if name.value is None else name.value.decode()
        raise RuntimeError(f"CUDA driver: {said} ({code}) in {what}")


def check_suited(compiled: Any, grid: tuple[int, int, int]) -> None:
    """Raise Unsuited for what Triton's launcher does more for than handing arguments to the driver."""
    import triton

    metadata = compiled.metadata
    if metadata.target.backend != "cuda":
        raise Unsuited(f"{compiled.name} is compiled for {metadata.target.backend}")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not FIRST_TRITON <= version < BEFORE_TRITON:
        raise Unsuited(f"Triton is {triton.__version__}")
    for name in (
        "global_scratch_size",
        "profile_scratch_size",
        "launch_cooperative_grid",
        "launch_pdl",
    ):
        if getattr(metadata, name):
            raise Unsuited(f"{compiled.name} has {name}")
    _, num_ctas, shared_bytes = compiled.packed_metadata
    if num_ctas != 1 or shared_bytes > MOST_SHARED_BYTES:
        raise Unsuited(
            f"{compiled.name} has clusters of {num_ctas} and {shared_bytes} bytes of shared memory"
        )
    if 0 in grid:
        raise Unsuited(f"{compiled.name} has an empty grid")


def fields_of(compiled: Any, arguments: Sequence[Any]) -> list[Field]:
    """The parameters of a launch as the driver takes them, in their order.

    Args:
        compiled: Triton's compiled kernel, without hooks.
        arguments: numbers, None, `Address`, `Map`, and tuples of them, one per parameter of the kernel in Triton's language.
    """
    types = tuple(compiled.src.signature.values())
    maps = iter(compiled.metadata.tensordesc_meta or ())
    fields = list(_fields(types, tuple(arguments), maps))
    # Scratch memory that the kernel has none of.
    return fields + [Field(FIELD_BYTES, bytes(FIELD_BYTES))] * 2


def _fields(
    types: Sequence[Any], arguments: Sequence[Any], maps: Iterator[dict[str, Any]]
) -> Iterator[Field]:
    if len(types) != len(arguments):
        raise Unsuited(f"{len(arguments)} arguments for {len(types)} parameters")
    for kind, argument in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _fields(kind, argument, maps)
        elif kind == "constexpr":
            continue
        elif kind.startswith("*"):
            yield Field(FIELD_BYTES, _address(argument))
        elif kind.startswith("tensordesc"):
            facts = next(maps, None)
            if facts is None or not isinstance(argument, Map):
                raise Unsuited("a descriptor that is no tensor map")
            yield Field(MAP_BYTES, (argument.place, encode(argument, facts)))
            yield from (_scalar("i32", size) for size in argument.shape)
            yield from (_scalar("i64", stride) for stride in argument.strides)
        else:
            yield _scalar(kind, argument)


def _address(argument: Any) -> bytes | Address:
    if isinstance(argument, Address):
        return argument
    if argument is None or isinstance(argument, int):
        return struct.pack("Q", argument or 0)
    raise Unsuited(f"a pointer given as {type(argument).__name__}")


def _scalar(kind: str, value: Any) -> Field:
    if kind not in _SCALARS or not isinstance(value, int | float):
        raise Unsuited(f"a parameter of type {kind} given as {type(value).__name__}")
    code, size = _SCALARS[kind]
    try:
        packed = struct.pack(code, value)
    except (struct.error, OverflowError) as error:
        raise Unsuited(f"{value} as a parameter of type {kind}") from error
    return Field(size, packed.ljust(FIELD_BYTES, b"\0"))


def encode(tensor_map: Map, facts: dict[str, Any]) -> bytes:
    """What the TMA reads, as Triton encodes it; `facts`: what the compiler says of the descriptor."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if facts["fp4_padded"] or facts.get("is_im2col"):
        raise Unsuited("a tensor map of another kind than tiles")
    rank, item_bytes = len(tensor_map.shape), facts["elem_size"]
    sizes, blocks, ones = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank, (1,) * rank
    strides = [item_bytes * stride for stride in reversed(tensor_map.strides[:-1])]
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    place = _aligned(ctypes.addressof(memory), MAP_ALIGNMENT)
    no_interleave, promotion_of_128_bytes = 0, 2
    code = _driver().cuTensorMapEncodeTiled(
        place,
        TMA_DTYPE_DEVICE_TO_HOST[facts["elem_type"]],
        rank,
        tensor_map.address,
        sizes(*reversed(tensor_map.shape)),
        sizes(*strides),
        blocks(*reversed(facts["block_size"])),
        blocks(*ones),
        no_interleave,
        facts["swizzle"],
        promotion_of_128_bytes,
        1 if tensor_map.padding == "nan" else 0,
    )
    _check(code, "cuTensorMapEncodeTiled")
    return ctypes.string_at(place, MAP_BYTES)


def check_against_driver(compiled: Any, fields: Sequence[Field]) -> None:
    """Raise Unsuited unless the loaded kernel takes parameters of these sizes."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    for number, field in enumerate([*fields, None]):
        code = _driver().cuFuncGetParamInfo(
            compiled.function, number, ctypes.byref(offset), ctypes.byref(size)
        )
        expected = None if field is None else field.size
        found = None if code else size.value
        if found != expected:
            raise Unsuited(
                f"parameter {number} of {compiled.name} has {found} bytes instead of {expected}"
            )


def _aligned(address: int, alignment: int) -> int:
    return -(-address // alignment) * alignment


class ArgumentBlock:
    """Launches of compiled kernels one after the other, whose arguments lie in one block of memory.

    The block begins with a field per address that some launch takes, which are what `start` fills in; then come the constants and the
    tensor maps. The driver has read everything when a launch returns.
    """

    def __init__(self, launches: Sequence[tuple[Any, tuple[int, int, int], Sequence[Any]]]):
        """`launches`: compiled kernel, grid and arguments (see `fields_of`) of each."""
        parameters = [fields_of(compiled, arguments) for compiled, _, arguments in launches]
        for (compiled, _, _), fields in zip(launches, parameters, strict=True):
            check_against_driver(compiled, fields)
        addresses: dict[Address, int] = {}
        constants: dict[bytes, int] = {}
        maps: dict[tuple[Address, bytes], int] = {}
        for _, value in itertools.chain(*parameters):
            if isinstance(value, bytes):
                constants.setdefault(value, len(constants))
            elif isinstance(value, Address):
                addresses.setdefault(value, len(addresses))
            else:
                maps.setdefault(value, len(maps))
                addresses.setdefault(value[0], len(addresses))
        self.places = tuple(addresses)
        self._lock = threading.Lock()
        self._pack = struct.Struct(f"{len(addresses)}Q").pack_into
        begin_constants = FIELD_BYTES * len(addresses)
        begin_maps = _aligned(begin_constants + FIELD_BYTES * len(constants), MAP_ALIGNMENT)
        size = begin_maps + MAP_BYTES * len(maps)
        self._memory = ctypes.create_string_buffer(size + MAP_ALIGNMENT)
        start = _aligned(ctypes.addressof(self._memory), MAP_ALIGNMENT)
        self._begin = start - ctypes.addressof(self._memory)
        for value, number in constants.items():
            ctypes.memmove(start + begin_constants + FIELD_BYTES * number, value, FIELD_BYTES)
        for (_, encoded), number in maps.items():
            ctypes.memmove(start + begin_maps + MAP_BYTES * number, encoded, MAP_BYTES)

        def place_of(value: bytes | Address | tuple[Address, bytes]) -> int:
            if isinstance(value, Address):
                return start + FIELD_BYTES * addresses[value]
            if isinstance(value, bytes):
                return start + begin_constants + FIELD_BYTES * constants[value]
            return start + begin_maps + MAP_BYTES * maps[value]

        self._maps = tuple((place_of(value), addresses[value[0]]) for value in maps)
        self._stream = 0
        self._configs = tuple(
            LaunchConfig(grid, (32 * packed[0], 1, 1), packed[2], None, None, 0)
            for grid, packed in ((grid, compiled.packed_metadata) for compiled, grid, _ in launches)
        )
        self._pointers = tuple(
            (ctypes.c_void_p * len(fields))(*(place_of(value) for _, value in fields))
            for fields in parameters
        )
        # Kernels stay loaded for as long as Triton's objects live.
        self._kernels = tuple(compiled for compiled, _, _ in launches)
        self._launches = tuple(
            (ctypes.addressof(config), compiled.function, ctypes.addressof(pointers))
            for config, compiled, pointers in zip(
                self._configs, self._kernels, self._pointers, strict=True
            )
        )

    def start(self, addresses: Sequence[int], stream: int) -> None:
        """Start the kernels on a stream of the current device; `addresses`: of the tensors, by slot."""
        driver = _driver()
        launch, replace = driver.cuLaunchKernelEx, driver.cuTensorMapReplaceAddress
        values = [addresses[slot] + skipped for slot, skipped in self.places]
        with self._lock:
            self._pack(self._memory, self._begin, *values)
            for place, number in self._maps:
                if code := replace(place, values[number]):
                    _check(code, "cuTensorMapReplaceAddress")
            if stream != self._stream:
                self._stream = stream
                for config in self._configs:
                    config.stream = stream
            for number, (config, function, pointers) in enumerate(self._launches):
                if code := launch(config, function, pointers, None):
                    _check(code, f"the launch of {self._kernels[number].name}")
