"""Compiles Metal source to a shared library, once per source, and type-checks its address spaces.

The compiler is PyPI's ziglang, whose clang is the same on every machine, or else a clang++ of version 19 or later.
Libraries and the compiler's own cache lie in the repository's ignored .cache/metal_on_cpu/.
"""

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .source import HEADER, KernelSource, kernels, prepare, translation_unit

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "metal_on_cpu"
CLANG = ("clang++-22", "clang++-21", "clang++-20", "clang++-19")

LANGUAGE = ("-x", "c++", "-std=c++17", "-fsigned-char", "-w", "-D__METAL__=1", "-D__METAL_VERSION__=310")
# Contraction as free as in Metal's fast math: only the source's own pragma keeps products and sums apart.
CODE = ("-O2", "-ffp-contract=fast-honor-pragmas", "-shared", "-fPIC", "-nostdlib++", "-g0")
# threads.h hears of every load and store, none wider than 16 bytes, of unaligned ones and of indices outside arrays.
SANITIZE = (
    "-fno-sanitize=all", "-fsanitize=alignment,array-bounds", "-fsanitize-recover=alignment,array-bounds",
    "-fsanitize-coverage=func,trace-loads,trace-stores", "-fno-vectorize", "-fno-slp-vectorize", "-fno-builtin",
    "-U_FORTIFY_SOURCE",
)  # fmt: skip


class MetalCompileError(SyntaxError):
    """The source is not valid Metal; the message is the compiler's."""


class MetalCompilerMissing(RuntimeError):
    """There is no clang to compile with."""


@cache
def compiler() -> tuple[str, ...]:
    """The command of clang; raises MetalCompilerMissing.

    On x86 the processor is one with fused multiply-add and without the bfloat16 instructions, which flush subnormals.
    """
    x86 = platform.machine() == "x86_64"
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++", *["-mcpu=x86_64_v3"] * x86)
    for name in CLANG:
        if shutil.which(name):
            return (name, *["-march=x86-64-v3"] * x86)
    raise MetalCompilerMissing("Running Metal on the CPU needs clang 19 or later: pip install ziglang.")


def build(source: str) -> tuple[Path, list[KernelSource]]:
    """Return the shared library of ``source`` and its kernels. Raises MetalCompileError."""
    digest = hashlib.sha256(repr((compiler(), LANGUAGE, CODE, SANITIZE)).encode())
    for path in sorted([*HEADER.parent.glob("*.h"), *HEADER.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    digest.update(source.encode())
    folder = CACHE / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library, text = folder / "shader.so", folder / "shader.ii"
    with _locked(folder / "building"):
        if not library.exists():
            plain = folder / "shader.metal"
            plain.write_text(prepare(source))
            _run(*LANGUAGE, "-E", str(plain), "-o", str(text))
            unit = folder / "shader.cpp"
            unit.write_text(translation_unit(text.read_text(), kernels(text.read_text())))
            _run(*LANGUAGE, "-DMETAL_ADDRESS_SPACES", "-O0", "-c", str(unit), "-o", str(folder / "checked.o"))
            _run(*LANGUAGE, *CODE, *SANITIZE, str(unit), "-o", str(folder / "unfinished.so"))
            os.replace(folder / "unfinished.so", library)
    return library, kernels(text.read_text())


def _run(*arguments: str) -> None:
    folders = {"ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"), "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig")}
    result = subprocess.run([*compiler(), *arguments], env=os.environ | folders, capture_output=True, text=True)
    if result.returncode:
        raise MetalCompileError(result.stderr or f"clang ended with status {result.returncode}")


@contextmanager
def _locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
