"""What the CUDA driver is handed by a block of arguments, read back by a driver that writes it down."""

import ctypes
import struct
import sys
import threading
from types import SimpleNamespace

import pytest

from hf_blocksparse.ops.triton import argument_block
from hf_blocksparse.ops.triton.argument_block import (
    MAP_BYTES,
    Address,
    ArgumentBlock,
    LaunchConfig,
    Map,
    Unsuited,
    check_suited,
)

FACTS = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64], "fp4_padded": False}
INVALID = 1


class Driver:
    """Knows of kernels the sizes of their parameters, and notes what a launch reads."""

    def __init__(self):
        self.sizes, self.launches, self.code = {}, [], 0

    def cuFuncGetParamInfo(self, function, number, offset, size):
        if number >= len(self.sizes[function]):
            return INVALID
        size._obj.value = self.sizes[function][number]
        return 0

    def cuTensorMapReplaceAddress(self, place, address):
        assert place % 64 == 0
        ctypes.memmove(place, struct.pack("Q", address), 8)
        return 0

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        assert extra is None
        config = LaunchConfig.from_address(config)
        sizes = self.sizes[function]
        read = [
            ctypes.string_at(pointer, size)
            for pointer, size in zip(
                (ctypes.c_void_p * len(sizes)).from_address(pointers), sizes, strict=True
            )
        ]
        facts = (*config.grid, *config.block, config.shared_bytes, config.stream)
        assert (config.attributes, config.num_attributes) == (None, 0)
        self.launches.append((function, facts, read))
        return self.code

    def cuGetErrorName(self, code, name):
        name._obj.value = b"CUDA_ERROR_TEST"
        return 0


@pytest.fixture
def driver(monkeypatch):
    double = Driver()
    monkeypatch.setattr(argument_block, "_driver", lambda: double)
    monkeypatch.setattr(
        argument_block, "encode", lambda tensor_map, facts: encoded(tensor_map.address)
    )
    return double


def encoded(address):
    return struct.pack("QQ", address, 99).ljust(MAP_BYTES, b"\0")


def kernel(driver, function, signature, sizes, maps=(), **metadata):
    """A compiled kernel; `sizes`: of the parameters that the driver knows of, without those of scratch memory."""
    driver.sizes[function] = [*sizes, 8, 8]
    facts = dict(
        target=SimpleNamespace(backend="cuda"), tensordesc_meta=maps, global_scratch_size=0,
        profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
    )  # fmt: skip
    return SimpleNamespace(
        name=f"kernel {function}",
        function=function,
        packed_metadata=(8, 1, 1000),
        metadata=SimpleNamespace(**facts | metadata),
        src=SimpleNamespace(signature=signature),
    )


FIRST = {
    "query": "tensordesc<bf16[1, 64]>",
    "rows": ("*bf16", ("i32", "constexpr", "i64")),
    "kept": "*i32",
    "none": "*fp32",
    "scale": "fp32",
    "SIZE": "constexpr",
}
FIRST_SIZES = (MAP_BYTES, 4, 4, 8, 8, 8, 4, 8, 8, 8, 4)


def first_arguments():
    query = Map(Address(0), (7, 64), (64, 1), "zero", 4096)
    return (query, (Address(1), (5, 1, 1 << 40)), 0xABC0, None, 0.1, 64)


def test_a_launch_gets_its_constants_and_the_addresses_of_now(driver):
    one = kernel(driver, 11, FIRST, FIRST_SIZES, maps=(FACTS,))
    two = kernel(driver, 12, {"a": "*fp32", "b": "*fp32", "n": "i32"}, (8, 8, 4))
    block = ArgumentBlock(
        [
            (one, (3, 2, 1), first_arguments()),
            (two, (4, 1, 1), (Address(1), Address(2, 512), -1)),
        ]
    )
    for addresses, stream in (((1 << 20, 1 << 30, 1 << 44), 7), ((640, 800, 960), 9)):
        driver.launches.clear()
        block.start(addresses, stream)
        (function, facts, read), (other, other_facts, other_read) = driver.launches
        assert function == 11 and facts == (3, 2, 1, 256, 1, 1, 1000, stream)
        assert read[0] == encoded(addresses[0])
        assert read[1:5] == [struct.pack(c, n) for c, n in zip("iiqq", (7, 64, 64, 1), strict=True)]
        assert read[5:8] == [
            struct.pack("Q", addresses[1]), struct.pack("i", 5), struct.pack("q", 1 << 40),
        ]  # fmt: skip
        assert read[8:10] == [struct.pack("Q", 0xABC0), bytes(8)]
        assert read[10] == struct.pack("f", 0.1) and read[11:] == [bytes(8)] * 2
        assert other == 12 and other_facts == (4, 1, 1, 256, 1, 1, 1000, stream)
        assert other_read[0] == struct.pack("Q", addresses[1])
        assert other_read[1] == struct.pack("Q", addresses[2] + 512)
        assert other_read[2] == struct.pack("i", -1)


def test_two_threads_do_not_mix_their_addresses(driver):
    one = kernel(driver, 1, {"a": "*fp32", "b": "*fp32"}, (8, 8))
    block = ArgumentBlock([(one, (1, 1, 1), (Address(0), Address(1)))] * 3)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def start_often(address):
        for _ in range(300):
            block.start((address, address), address)

    threads = [threading.Thread(target=start_often, args=(16 * n,)) for n in range(1, 5)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(driver.launches) == 4 * 300 * 3
    for _, facts, read in driver.launches:
        assert read[0] == read[1] == struct.pack("Q", facts[-1])


def test_a_map_is_encoded_as_triton_does(monkeypatch):
    double = SimpleNamespace()
    monkeypatch.setattr(argument_block, "_driver", lambda: double)
    tensor_map = Map(Address(0), (5, 7, 64), (448, 64, 1), "zero", 4096)
    told = {}

    def note(place, dtype, rank, address, shape, strides, block, steps, *options):
        told["facts"] = (dtype, rank, address, options)
        told["lists"] = [list(part) for part in (shape, strides[: rank - 1], block, steps)]
        return 0

    double.cuTensorMapEncodeTiled = note
    argument_block.encode(tensor_map, FACTS | {"block_size": [1, 32, 64]})
    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; not interleaved, swizzled by 128 bytes, L2 lines of 128 bytes, zeros outside.
    assert told["facts"] == (9, 3, 4096, (0, 3, 2, 0))
    assert told["lists"] == [[64, 7, 5], [128, 896], [64, 32, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": SimpleNamespace(backend="hip")}, "compiled for hip"),
        ({"global_scratch_size": 8}, "global_scratch_size"),
        ({"profile_scratch_size": 8}, "profile_scratch_size"),
        ({"launch_cooperative_grid": True}, "launch_cooperative_grid"),
        ({"launch_pdl": True}, "launch_pdl"),
    ],
)
def test_what_triton_does_more_for_is_left_to_it(change, reason, driver):
    one = kernel(driver, 1, FIRST, FIRST_SIZES)
    check_suited(one, (1, 1, 1))
    with pytest.raises(Unsuited, match=reason):
        check_suited(kernel(driver, 1, FIRST, FIRST_SIZES, **change), (1, 1, 1))


@pytest.mark.parametrize("packed", [(8, 2, 1000), (8, 1, 229 * 1024)])
def test_clusters_and_oversized_shared_memory_are_left_to_triton(packed, driver):
    one = kernel(driver, 1, FIRST, FIRST_SIZES)
    one.packed_metadata = packed
    with pytest.raises(Unsuited, match="clusters"):
        check_suited(one, (1, 1, 1))


def test_an_empty_grid_and_an_unknown_triton_are_left_to_triton(driver, monkeypatch):
    one = kernel(driver, 1, FIRST, FIRST_SIZES)
    with pytest.raises(Unsuited, match="empty grid"):
        check_suited(one, (1, 0, 1))
    monkeypatch.setattr("triton.__version__", "3.10.0")
    with pytest.raises(Unsuited, match=r"Triton is 3\.10\.0"):
        check_suited(one, (1, 1, 1))


@pytest.mark.parametrize(
    ("signature", "sizes", "arguments", "reason"),
    [
        ({"a": "i32"}, (8,), (1,), "has 8 bytes instead of 4"),
        ({"a": "i32"}, (4, 4), (1,), "parameter 1 of kernel 1 has 4 bytes instead of 8"),
        ({"a": "i32"}, (4,), (1, 2), "2 arguments for 1 parameters"),
        ({"a": "bf16"}, (2,), (1.0,), "type bf16"),
        ({"a": "i32"}, (4,), (1 << 31,), "2147483648 as a parameter of type i32"),
        ({"a": "i32"}, (4,), (None,), "given as NoneType"),
        ({"a": "*i32"}, (8,), (1.5,), "a pointer given as float"),
        ({"a": "tensordesc<bf16[1]>"}, (8,), (first_arguments()[0],), "no tensor map"),
    ],
)
def test_what_is_not_known_to_be_the_same_is_refused(signature, sizes, arguments, reason, driver):
    one = kernel(driver, 1, signature, sizes)
    with pytest.raises(Unsuited, match=reason):
        ArgumentBlock([(one, (1, 1, 1), arguments)])


def test_a_parameter_that_only_the_driver_knows_is_refused(driver):
    one = kernel(driver, 1, {"a": "i32"}, (4,))
    driver.sizes[1].append(8)
    with pytest.raises(Unsuited, match="parameter 3 of kernel 1 has 8 bytes instead of None"):
        ArgumentBlock([(one, (1, 1, 1), (1,))])


def test_an_error_of_the_driver_is_raised(driver):
    block = ArgumentBlock([(kernel(driver, 1, {"a": "*i32"}, (8,)), (1, 1, 1), (Address(0),))])
    driver.code = 700
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_TEST \(700\) in the launch of kernel 1"):
        block.start((16,), 0)
