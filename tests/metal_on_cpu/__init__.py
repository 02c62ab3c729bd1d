"""Metal shading language on the CPU: what torch.mps.compile_shader does, with clang in place of Apple's compiler.

The source is compiled unchanged against metal_stdlib.h beside this file, once with Metal's address spaces for the type
checker, once to run. It knows what the pack's kernels use: vectors, threadgroup arrays, barriers, simdgroup exchanges
and 8 x 8 matrices. A kernel that does what is undefined on a GPU raises MetalFault (threads.h says what is noticed).
"""

from .build import MetalCompileError, MetalCompilerMissing
from .library import Kernel, Library, MetalFault, compile_shader

__all__ = ["Kernel", "Library", "MetalCompileError", "MetalCompilerMissing", "MetalFault", "compile_shader"]
