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


def run(body, *tensors, parameters="", threads=64, group_size=64, before=""):
    """Run ``body`` as a kernel over float buffers a, b, ..., with the usual positions."""
    buffers = ", ".join(f"device float* {name} [[buffer({i})]]" for i, name in zip(range(len(tensors)), "abcd"))
    library = compile_shader(
        f"{HEADER}{before}\nkernel void f({buffers}, uint i [[thread_position_in_grid]],"
        " uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],"
        f" uint simdgroup [[simdgroup_index_in_threadgroup]]) {{\n{body}\n}}"
    )
    library.f(*tensors, threads=threads, group_size=group_size)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def test_threadgroup_arrays_and_barriers():
    """Each group reverses its 64 numbers; 40 threads of the last group are not there."""
    a = torch.arange(152.0)
    run(
        f"threadgroup float all[64];\nall[index] = a[i];\n{BARRIER}a[i] = all[(i < 128 ? 63 : 23) - index];",
        a, threads=152,
    )  # fmt: skip
    groups = [torch.arange(start, stop).flip(0) for start, stop in ((0, 64), (64, 128), (128, 152))]
    assert torch.equal(a, torch.cat(groups).float())


def test_threadgroup_arrays_are_not_numbers_at_first():
    a = torch.zeros(128)
    run("threadgroup float all[64];\na[i] = all[index];\nall[index] = 1.0f;", a, threads=128)
    assert a.isnan().all()


def test_positions_in_groups():
    library = compile_shader(
        HEADER + "kernel void f(device int* out [[buffer(0)]], uint2 at [[thread_position_in_grid]],"
        " uint2 local [[thread_position_in_threadgroup]], uint index [[thread_index_in_threadgroup]],"
        " uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],"
        " uint2 groups [[threadgroups_per_grid]], uint simdgroups [[simdgroups_per_threadgroup]]) {"
        " out[at.y * 24 + at.x] = int(simd_sum(lane == 0 ? 0u : 0u) + 1000000 * groups.x + 100000 * simdgroups"
        " + 10000 * simdgroup + 100 * lane + 10 * local.y + (index == local.y * 12 + local.x)); }"
    )
    out = torch.zeros(8, 24, dtype=torch.int32)
    library.f(out, threads=(24, 8), group_size=(12, 4))
    y, x = torch.meshgrid(torch.arange(8), torch.arange(24), indexing="ij")
    index = y % 4 * 12 + x % 12
    expected = 2200000 + 10000 * (index // 32) + 100 * (index % 32) + 10 * (y % 4) + 1
    assert torch.equal(out.long(), expected)


def test_simdgroup_exchanges():
    a = torch.arange(96.0)
    b, c, d = torch.zeros(96), torch.zeros(96), torch.zeros(96)
    run(
        "b[i] = simd_sum(a[i]) + simd_sum(1.0f);\nc[i] = simd_shuffle_xor(a[i], 5);\n"
        "d[i] = simd_broadcast(a[i], 7) + 1000.0f * simd_shuffle(a[i], (lane + 1) % 32);",
        a, b, c, d, threads=96, group_size=96,
    )  # fmt: skip
    groups = a.view(3, 32)
    assert torch.equal(b.view(3, 32), (groups.sum(1, keepdim=True) + 32).expand(3, 32))
    assert torch.equal(c, torch.arange(96).bitwise_xor(torch.tensor(5)).float())
    assert torch.equal(d.view(3, 32), groups[:, 7:8] + 1000 * groups.roll(-1, 1))


@pytest.mark.parametrize("kind, dtype", (("float", torch.float32), ("half", torch.half), ("bfloat", torch.bfloat16)))
def test_simdgroup_matrices(kind, dtype):
    """c = a b^T + 1 by 8 x 8 matrices, from the device's memory; c by way of threadgroup memory."""
    library = compile_shader(
        HEADER + f"kernel void f(device const {kind}* a [[buffer(0)]], device const {kind}* b [[buffer(1)]],"
        " device float* c [[buffer(2)]], uint lane [[thread_index_in_simdgroup]]) {\n"
        "  threadgroup float shared[64];\n"
        f"  simdgroup_matrix<{kind}, 8, 8> left, right;\n"
        "  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8>(1.0f);\n"
        "  for (uint k = 0; k < 24; k += 8) {\n"
        "    simdgroup_load(left, a + k, 24);\n"
        "    simdgroup_load(right, b, 24, ulong2(k, 0), true);\n"
        "    simdgroup_multiply_accumulate(sum, left, right, sum);\n"
        "  }\n"
        "  simdgroup_store(sum, shared, 8);\n"
        "  simdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "  for (uint i = lane; i < 64; i += 32) c[i] = shared[i];\n}"
    )
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-3, 4, (8, 24), generator=generator).to(dtype) for _ in range(2))
    c = torch.zeros(8, 8)
    library.f(a, b, c, threads=32, group_size=32)
    assert torch.equal(c, a.float() @ b.float().T + 1)


FAULTS = {
    "a read after a buffer": ("a[i] = b[i + 1];", "outside"),
    "a read before a buffer": ("if (i == 63) a[i] = *(b - 1);", "outside"),
    "a write after a buffer": ("a[i + 1] = 1.0f;", "outside"),
    "a wild address": ("if (i == 5) a[i] = *(b + (1ul << 40));", "outside"),
    "a threadgroup array's end": ("threadgroup float s[64];\na[i] = (s + 1)[index];", "outside"),
    "a threadgroup array's beginning": ("threadgroup float s[64];\n*(s - 1) = 1.0f;", "outside"),
    "a thread's array": ("float s[4];\nfor (int k = 0; k < 4; ++k) s[k] = b[k];\na[i] = s[i];", "outside"),
    "a word in pieces": ("a[i] = float(*(device const uint*)((device const uchar*)(b) + 1));", "alignment"),
    "a barrier for half": (f"if (lane < 16) {{ {BARRIER} }}\na[i] = 1.0f;", "same barrier"),
    "a barrier for one simdgroup": (f"if (simdgroup == 0) {{ {BARRIER} }}\na[i] = 1.0f;", "same barrier"),
    "two barriers": (f"if (simdgroup == 0) {{\n{BARRIER}}} else {{\n{BARRIER}}}", "same barrier"),
    "an early end": (f"if (i == 40) return;\n{BARRIER}a[i] = 1.0f;", "same barrier"),
    "a sum for half": ("if (lane < 16) a[i] = simd_sum(b[i]);", "same simdgroup function"),
    "two sums": (
        "float v = 0.0f;\nif (lane < 16) {\nv = simd_sum(b[i]);\n} else {\nv = simd_sum(b[i]);\n}\na[i] = v;",
        "same simdgroup function",
    ),
    "a matrix for half": (
        "simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8>(1.0f);\n"
        "if (lane >= 16) simdgroup_store(m, a, 8);",
        "same simdgroup function",
    ),
    "a matrix from two places": (
        "simdgroup_float8x8 m;\nsimdgroup_load(m, b + lane / 16, 8, ulong2(0), true);", "same simdgroup function"
    ),
    "a matrix after a buffer": ("simdgroup_float8x8 m;\nsimdgroup_load(m, b + 8, 8);", "outside"),
    "a read without a barrier": (
        f"threadgroup float s[64];\ns[index] = 1.0f;\na[i] = s[63 - index];\n{BARRIER}", "without a barrier"
    ),
    "a write without a barrier": (
        f"threadgroup float s[64];\ns[index] = 1.0f;\n{BARRIER}a[i] = s[63 - index];\ns[index] = 2.0f;",
        "without a barrier",
    ),
    "two writes": ("threadgroup float s[64];\ns[index / 2] = 1.0f;", "without a barrier"),
    "a barrier that orders nothing": (
        "threadgroup float s[64];\ns[index] = 1.0f;\nthreadgroup_barrier(mem_flags::mem_none);\na[i] = s[63 - index];",
        "without a barrier",
    ),
    "a simdgroup's barrier for two": (
        "threadgroup float s[64];\ns[index] = 1.0f;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "a[i] = s[63 - index];",
        "without a barrier",
    ),
    "a matrix without a barrier": (
        "threadgroup float s[64];\nif (simdgroup > 0) return;\ns[lane] = 1.0f;\ns[lane + 32] = 1.0f;\n"
        "simdgroup_float8x8 m;\nsimdgroup_load(m, s, 8);\nsimdgroup_store(m, a, 8);",
        "without a barrier",
    ),
    "40 KB": (f"threadgroup float s[10240];\ns[index] = 1.0f;\n{BARRIER}", "32 KB"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_undefined_on_a_gpu_is_a_fault(name):
    body, words = FAULTS[name]
    a, b = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        with pytest.raises(MetalFault, match=words):
            run(body, a, b)


def test_barriers_order_what_they_should():
    """What the faults above become with the right barriers, and a launch after a fault."""
    a, b = torch.zeros(64), torch.arange(64.0)
    with pytest.raises(MetalFault):
        run(FAULTS["a barrier for half"][0], a, b)
    run(
        f"threadgroup float s[64];\ns[index] = b[i];\n{BARRIER}const float v = s[63 - index];\n{BARRIER}"
        "s[index] = v + 1.0f;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "const float w = s[32 * simdgroup + (lane + 1) % 32];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "s[index] = w;\na[i] = s[index];",
        a, b,
    )  # fmt: skip
    assert torch.equal(a, (b.flip(0) + 1).view(2, 32).roll(-1, 1).reshape(64))


@pytest.mark.parametrize("statement", ["device float* p = s;", "threadgroup float* p = a;", "simdgroup_load(m, q, 8);"])
def test_threadgroup_arrays_have_their_address_space(statement):
    body = "threadgroup float s[64];\nsimdgroup_float8x8 m;\nfloat q[64];\n"
    with pytest.raises(MetalCompileError, match=r"error: (cannot initialize|no matching function)"):
        run(body + statement, torch.zeros(64))
