"""Builds efe_kernels._C with the CUDA sources on the emulator, and their glue, in place of the C++ kernels.

Runs in the root of the repository with the arguments of setup.py:

    python -m tests.emulated.extension build --build-temp build/emulated/objects --build-lib build/emulated
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

from tests.emulated.translate import join, translate

TRANSLATED = Path("build/emulated/cuda.cpp")
# What a GPU would refuse and a CPU forgives: a wide access off its alignment, an index outside of shared memory.
CHECKS = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]


def main() -> None:
    TRANSLATED.parent.mkdir(parents=True, exist_ok=True)
    write_if_new(TRANSLATED, translate(join(Path("csrc")), "csrc"))
    setup(
        ext_modules=[
            cpp_extension.CppExtension(
                "efe_kernels._C",
                ["csrc/bindings.cpp", "tests/emulated/glue.cpp", "tests/emulated/emulator.cpp", str(TRANSLATED)],
                # What stands in for a header of csrc comes before it.
                include_dirs=[
                    os.path.abspath(folder) for folder in ("tests/emulated/include", "tests/emulated", "csrc")
                ],
                define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # as in setup.py
                extra_compile_args=["-std=c++20", "-O1", "-g1", "-fvisibility=hidden", "-Wno-unknown-pragmas", *CHECKS],
                extra_link_args=CHECKS,
            )
        ],
        cmdclass={"build_ext": cpp_extension.BuildExtension},
    )


def write_if_new(file: Path, text: str) -> None:
    """Leaves a file with the same text alone, so that it is not compiled again."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


if __name__ == "__main__":
    main()
