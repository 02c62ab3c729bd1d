"""Reads the kernels out of Metal source and writes the C++ that launches them."""

import re
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).with_name("metal_stdlib.h")

# Per attribute, the launcher's variables for x, y and z.
POSITIONS = {
    "thread_position_in_grid": ("position[0]", "position[1]", "position[2]"),
    "threads_per_grid": ("grid[0]", "grid[1]", "grid[2]"),
    "thread_position_in_threadgroup": ("local[0]", "local[1]", "local[2]"),
    "threadgroup_position_in_grid": ("group[0]", "group[1]", "group[2]"),
    "threads_per_threadgroup": ("size[0]", "size[1]", "size[2]"),
}

INCLUDE = re.compile(r"#\s*include\s*<metal_\w+>")
PRAGMA = re.compile(r"#\s*pragma\s+METAL\s+fp\s+contract\s*\(\s*(\w+)\s*\)")
QUALIFIER = re.compile(r"\[\[\s*kernel\s*\]\]")
HOST_NAME = re.compile(r"\[\[\s*host_name\([^)]*\)\s*\]\]")
INSTANCE = re.compile(
    r'template\s*\[\[\s*host_name\(([\w"\s]+)\)\s*\]\]\s*kernel\s+decltype\((\w+)<[^;]*>\)\s*(\w+)<([^;]*)>\s*;'
)
LITERAL = re.compile(r'"(\w*)"')
DEFINITION = re.compile(r"(template\s*<[^{};()]*>\s*)?kernel\s+void\s+(\w+)\s*\(([^{;]*)\)\s*\{")
BUFFER = re.compile(r"\[\[\s*buffer\((\d+)\)\s*\]\]")
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*\]\]")

LAUNCHER = """
extern "C" long metal_faults() {{ return metal_on_cpu_faults; }}
{launchers}
"""

# What the compiler calls: its rounding to bfloat16 (to nearest, ties to even), which not every runtime library has, and
# the sanitizer's report of a load or store that the type's alignment does not permit: a GPU would access other bytes.
RUNTIME = """
static long metal_on_cpu_faults = 0;
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t) { ++metal_on_cpu_faults; }
extern "C" __attribute__((weak)) __bf16 __truncsfbf2(float value) {
  const uint bits = __builtin_bit_cast(uint, value);
  const uint rounded = value != value ? bits | 0x400000 : bits + 0x7FFF + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, ushort(rounded >> 16));
}
"""

LAUNCH = """
extern "C" void launch_{name}(void** buffers, const unsigned long* grid, const unsigned long* size) {{
  using namespace metal_on_cpu;
  unsigned long group[3], local[3], position[3];
  for (group[2] = 0; group[2] * size[2] < grid[2]; ++group[2])
  for (group[1] = 0; group[1] * size[1] < grid[1]; ++group[1])
  for (group[0] = 0; group[0] * size[0] < grid[0]; ++group[0])
  for (local[2] = 0; local[2] < size[2]; ++local[2])
  for (local[1] = 0; local[1] < size[1]; ++local[1])
  for (local[0] = 0; local[0] < size[0]; ++local[0]) {{
    bool inside = true;
    for (int axis = 0; axis < 3; ++axis) {{
      position[axis] = group[axis] * size[axis] + local[axis];
      inside &= position[axis] < grid[axis];
    }}
    if (inside) {function}({arguments});
  }}
}}
"""


@dataclass(frozen=True)
class KernelSource:
    """A kernel: its name for the host, the function to call, and its parameters as they are written."""

    name: str
    function: str
    parameters: tuple[str, ...]


def prepare(source: str) -> str:
    """The source with pragmas in clang's spelling, `kernel` for [[kernel]], no headers: ready for the preprocessor."""
    plain = QUALIFIER.sub("kernel", INCLUDE.sub("", source))
    return PRAGMA.sub(r"#pragma clang fp contract(\1)", plain)


def kernels(preprocessed: str) -> list[KernelSource]:
    """All kernels with a name for the host: plain ones and explicit instantiations of templates."""
    plain, templates = [], {}
    for template, name, parameters in DEFINITION.findall(preprocessed):
        split = tuple(part.strip() for part in parameters.split(","))
        if template:
            templates[name] = split
        else:
            plain.append(KernelSource(name, name, split))
    instances = [
        KernelSource("".join(LITERAL.findall(host)), f"{function}<{arguments}>", templates[function])
        for host, _, function, arguments in INSTANCE.findall(preprocessed)
    ]
    return plain + instances


def translation_unit(preprocessed: str, found: list[KernelSource]) -> str:
    """C++ to compile: the header, the source, and a ``launch_<name>`` for each kernel."""
    body = HOST_NAME.sub("", preprocessed)
    launchers = "".join(
        LAUNCH.format(name=kernel.name, function=kernel.function, arguments=_arguments(kernel)) for kernel in found
    )
    footer = "#ifndef METAL_ADDRESS_SPACES\n" + LAUNCHER.format(launchers=launchers) + "#endif\n"
    return f'#include "{HEADER}"\n{RUNTIME}\n{body}\n{footer}'


def _arguments(kernel: KernelSource) -> str:
    return ", ".join(_argument(parameter) for parameter in kernel.parameters)


def _argument(parameter: str) -> str:
    buffer = BUFFER.search(parameter)
    if buffer:
        kind = "Pointer" if "*" in parameter else "Reference"
        return f"{kind}{{buffers[{buffer[1]}]}}"
    attribute = ATTRIBUTE.search(parameter)
    if attribute is None or attribute[1] not in POSITIONS:
        raise ValueError(f"Metal on the CPU cannot pass {parameter!r}: it is neither a buffer nor a known position.")
    kind = parameter.split()[0]
    count = int(kind[-1]) if kind[-1].isdigit() else 1
    components = POSITIONS[attribute[1]][:count]
    return f"{kind}({components[0]})" if count == 1 else f"make<{kind}>({', '.join(components)})"
