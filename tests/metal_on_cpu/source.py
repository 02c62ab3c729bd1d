"""Reads the kernels out of Metal source and writes the C++ that launches them."""

import re
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).with_name("metal_stdlib.h")

VECTORS = {
    "thread_position_in_grid": "position",
    "threads_per_grid": "grid",
    "thread_position_in_threadgroup": "local",
    "threadgroup_position_in_grid": "group",
    "threadgroups_per_grid": "groups",
    "threads_per_threadgroup": "size",
}
"""Attributes of one to three components, and Position's field for each."""

NUMBERS = {
    "thread_index_in_threadgroup": "index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
}
"""Attributes of one component."""

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
SHARED_ARRAY = re.compile(r"\bthreadgroup\s+([\w:<>, ]+?)\s+(\w+)\s*\[([^\]]+)\]\s*;")
COOPERATION = re.compile(r"\b(METAL_THREADGROUP_ARRAY|threadgroup_barrier|simdgroup_\w+|simd_\w+)\s*\(")
ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*\]\]")

LAUNCH = """
static void thread_{name}() {{
  using namespace metal_on_cpu;
  {function}({arguments});
}}
extern "C" int launch_{name}(
    void** buffers, const uint64_t* bytes, int count, const uint64_t* grid, const uint64_t* size) {{
  return metal_on_cpu::launch(thread_{name}, buffers, bytes, count, grid, size, {cooperative});
}}
"""


@dataclass(frozen=True)
class KernelSource:
    """A kernel: its name for the host, the function to call, and its parameters as they are written."""

    name: str
    function: str
    parameters: tuple[str, ...]


def prepare(source: str) -> str:
    """The source with pragmas in clang's spelling, `kernel` for [[kernel]], no headers: ready for the preprocessor.

    A threadgroup array becomes a macro's call: one array of a threadgroup's threads, not one of each.
    """
    plain = QUALIFIER.sub("kernel", INCLUDE.sub("", source))
    plain = SHARED_ARRAY.sub(r"METAL_THREADGROUP_ARRAY(\2, (\3), \1);", plain)
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
    """C++ to compile: the headers, the source, and a ``launch_<name>`` for each kernel."""
    body = HOST_NAME.sub("", preprocessed)
    cooperative = "true" if COOPERATION.search(preprocessed) else "false"
    launchers = "".join(
        LAUNCH.format(name=kernel.name, function=kernel.function, arguments=_arguments(kernel), cooperative=cooperative)
        for kernel in found
    )
    return f'#include "{HEADER}"\n{body}\n#ifndef METAL_ADDRESS_SPACES\n{launchers}#endif\n'


def _arguments(kernel: KernelSource) -> str:
    return ", ".join(_argument(parameter) for parameter in kernel.parameters)


def _argument(parameter: str) -> str:
    buffer = BUFFER.search(parameter)
    if buffer:
        kind = "Pointer" if "*" in parameter else "Reference"
        return f"{kind}{{state.addresses[{buffer[1]}]}}"
    attribute = ATTRIBUTE.search(parameter)
    name, kind = attribute[1] if attribute else "", parameter.split()[0]
    if name in NUMBERS:
        return f"{kind}(state.here.{NUMBERS[name]})"
    if name not in VECTORS:
        raise ValueError(f"Metal on the CPU cannot pass {parameter!r}: it is neither a buffer nor a known position.")
    components = [f"state.here.{VECTORS[name]}[{axis}]" for axis in range(int(kind[-1]) if kind[-1].isdigit() else 1)]
    return f"{kind}({components[0]})" if len(components) == 1 else f"make<{kind}>({', '.join(components)})"
