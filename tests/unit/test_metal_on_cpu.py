"""Metal on the CPU: torch.mps.compile_shader's calling convention, and what it refuses as a GPU would."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from metal_on_cpu import MetalCompileError, MetalFault, compile_shader

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def test_positions_and_uneven_groups():
    library = compile_shader(
        HEADER + "kernel void places(device int* out [[buffer(0)]], uint2 at [[thread_position_in_grid]],"
        " uint2 size [[threads_per_grid]], uint2 group [[threadgroup_position_in_grid]]) {"
        " out[at.y * size.x + at.x] += int(100 * group.x + 10 * group.y + 1); }"
    )
    out = torch.zeros(3, 5, dtype=torch.int32)
    library.places(out, threads=(5, 3), group_size=(4, 2))
    assert out.tolist() == [[1, 1, 1, 1, 101], [1, 1, 1, 1, 101], [11, 11, 11, 11, 111]]
    assert dir(library) == ["places"]


def test_scalars_lists_and_storage_offsets():
    library = compile_shader(
        HEADER + "kernel void sum(device float* out [[buffer(0)]], constant long& a [[buffer(1)]],"
        " constant float& b [[buffer(2)]], constant long* list [[buffer(3)]], constant half& c [[buffer(4)]],"
        " uint i [[thread_position_in_grid]]) { out[i] = float(a) + b + float(list[1]) + float(c); }"
    )
    out = torch.zeros(6)
    library.sum(out[2:4], 1, 0.5, [10, 20], 0.25, arg_casts={4: "fp16"})
    assert out.tolist() == [0, 0, 21.75, 21.75, 0, 0]
    with pytest.raises(RuntimeError, match="cannot be launched"):
        library.sum(out, 1, 0.5, [10, 20], 0.25, threads=0)


def test_template_instances_carry_their_host_names():
    library = compile_shader(
        HEADER + "template <typename T> kernel void twice(device T* x [[buffer(0)]],"
        " uint i [[thread_position_in_grid]]) { x[i] = T(2) * x[i]; }\n"
        '#define INSTANCE(T) template [[host_name("twice_" #T)]] kernel decltype(twice<T>) twice<T>;\n'
        "INSTANCE(float) INSTANCE(half) INSTANCE(bfloat)"
    )
    assert sorted(dir(library)) == ["twice_bfloat", "twice_float", "twice_half"]
    for dtype, kernel in ((torch.float16, library.twice_half), (torch.bfloat16, library.twice_bfloat)):
        values = torch.tensor([1.5, -3.0], dtype=dtype)
        kernel(values)
        assert values.tolist() == [3.0, -6.0]
    with pytest.raises(AttributeError, match="no kernel thrice"):
        _ = library.thrice


@pytest.mark.parametrize(
    "statement",
    [
        "thread const int* p = values;",
        "device int* p = &limit;",
        "constant int* p = values;",
        "int local = 1; device int* p = &local;",
        "helper(values);",
    ],
)
def test_address_spaces_are_checked(statement):
    source = (
        HEADER + "inline void helper(thread int* p) { *p = 1; }\n"
        "kernel void f(device int* values [[buffer(0)]], constant int& limit [[buffer(1)]],"
        f" uint i [[thread_position_in_grid]]) {{ {statement} }}"
    )
    with pytest.raises(MetalCompileError, match=r"error: (cannot initialize|no matching function)"):
        compile_shader(source)
    assert compile_shader(source.replace(statement, "values[i] = limit;"))


def test_an_unaligned_vector_access_is_a_fault():
    library = compile_shader(
        HEADER + "kernel void word(device const uchar* from [[buffer(0)]], device uint* out [[buffer(1)]],"
        " uint i [[thread_position_in_grid]]) { out[i] = *(device const uint*)(from); }"
    )
    storage, out = torch.arange(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    library.word(storage[4:], out, threads=1)
    assert out.item() == 0x07060504
    with pytest.raises(MetalFault, match="alignment forbids"):
        library.word(storage[1:], out, threads=1)


def test_only_the_pragma_keeps_products_and_sums_apart():
    """The compiler contracts where it may, as Metal's does; a source that asks for exactness gets it."""
    library = compile_shader(
        HEADER + "#pragma METAL fp contract(off)\nkernel void f(device float* x [[buffer(0)]],"
        " uint i [[thread_position_in_grid]]) { const float y = x[i] * x[i + 64]; x[i] = y - x[i + 128]; }"
    )
    x = torch.randn(192, generator=torch.Generator().manual_seed(0))
    x[128:] = x[:64] * x[64:128]
    library.f(x, threads=64)
    assert (x[:64] == 0).all()
