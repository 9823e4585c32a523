"""Write the locks of the image's variants: every package with the hashes of its wheels.

    python -m deploy.image.lock           # cu130 and cu128 from PyPI's metadata, and cpu derived from cu130
    python -m deploy.image.lock cpu       # one of them

The versions are those of requirements.lock, so that the image has the versions of the tests; but cu128 has an
older torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from deploy.image.variants import PYTHON_VERSIONS, VARIANTS, Variant, entries

ROOT = Path(__file__).parent.parent.parent
TORCH_CPU = """torch==2.13.0+cpu \\
    --hash=sha256:4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2 \\
    --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
"""
"""The hashes of its wheels for Python 3.12 and 3.11 on x86_64 Linux, from download.pytorch.org/whl/cpu."""
_ONLY_WITH_CUDA = re.compile(r"^(nvidia-(?!ml-py)|cuda-|triton)")


def main() -> None:
    """Lock the variants of the command line; by default all."""
    names = sys.argv[1:] or ["cu130", "cu128", "cpu"]
    for name in names:
        variant = VARIANTS[name]
        if name == "cpu":
            variant.lock.write_text(without_cuda(VARIANTS["cu130"].lock.read_text()))
        else:
            resolve(variant)
        print(f"{variant.lock.relative_to(ROOT)}: {len(entries(variant.lock.read_text()))} packages")


def resolve(variant: Variant) -> None:
    """Resolve pyproject.toml with uv for the image's Python, with the versions of requirements.lock."""
    constraints, overrides = (ROOT / "requirements.lock").read_text(), ""
    if variant.torch:
        # What torch alone needs has the versions that this torch asks for.
        constraints = re.sub(r"(?m)^(torch|triton|setuptools|sympy)==.*$", "", constraints)
        overrides = f"torch=={variant.torch}\n"
    with TemporaryDirectory() as folder:
        constraint, override = Path(folder) / "constraints.txt", Path(folder) / "overrides.txt"
        constraint.write_text(constraints)
        override.write_text(overrides)
        subprocess.run(
            [
                *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"),
                *("--constraints", str(constraint), "--overrides", str(override)),
                *("--python-version", PYTHON_VERSIONS[0], "--python-platform", "x86_64-manylinux_2_28"),
                *("--only-binary", ":all:", "--generate-hashes", "--no-header", "--no-annotate"),
                *("--no-emit-index-url", "--system-certs", "--quiet", "--output-file", str(variant.lock)),
            ],
            cwd=ROOT,
            check=True,
        )


def without_cuda(lock: str) -> str:
    """Derive the lock of PyTorch's CPU build: removes the packages that only CUDA needs."""
    return "".join(
        TORCH_CPU if entry.startswith("torch==") else entry
        for entry in entries(lock)
        if not _ONLY_WITH_CUDA.match(entry)
    )


if __name__ == "__main__":
    main()
