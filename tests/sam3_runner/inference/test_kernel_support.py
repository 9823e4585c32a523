"""Which steps run as kernels: without a compiler, or where a kernel fails, PyTorch computes the step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

from sam3_runner.inference.kernel_support import STEPS_BY_FILE, find_supported_steps
from sam3_runner.network import operations

if TYPE_CHECKING:
    from collections.abc import Callable

NO_COMPILER = (
    "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
)
"""Triton's own message, in triton/runtime/build.py."""
KERNELS = "/app/sam3_runner/network/kernels"


@pytest.fixture(autouse=True)
def _plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "plain_steps", set())


class Pass:
    """A pass whose steps fail where their kernels would run.

    Args:
        failing: by step, the file whose code fails, and its error.

    Attributes:
        runs: how often it was run.
    """

    def __init__(self, failing: dict[str, tuple[str, Exception]]) -> None:
        self._failing = failing
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        for step, (file, error) in self._failing.items():
            if step not in operations.plain_steps:
                raise_in(file, error)


def raise_in(file: str, error: Exception) -> None:
    """Raise `error` in code of the given file, as its traceback has it."""
    code: Callable[..., None]
    names: dict[str, Callable[[Exception], None]] = {}
    exec(compile("def launch(error):\n    raise error\n", file, "exec"), names)  # noqa: S102 - the code above
    code = names["launch"]
    code(error)


def test_every_kernel_works() -> None:
    """A pass that succeeds runs once, with all kernels."""
    run = Pass({})
    find_supported_steps(run)
    assert (run.runs, operations.plain_steps) == (1, set())


def test_no_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """Without a C compiler all of Triton's kernels are given up at once; the log says so, and why."""
    run = Pass({"attention": (f"{KERNELS}/attention.py", RuntimeError(NO_COMPILER))})
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        find_supported_steps(run)
    assert run.runs == 2
    # PyTorch's own kernels compute these two, without Triton.
    assert operations.STEPS - operations.plain_steps == {"relu", "residual"}
    [message] = caplog.messages
    assert message == (
        "the kernels for attention, box_bias, boxes, gelu, grid_attention, group_norm, norm, patches, rotary "
        "do not work here, and PyTorch computes these steps instead, more slowly: "
        f"RuntimeError: {NO_COMPILER}"
    )


def test_kernels_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """Only the steps of the files that fail are given up, one file after the other, each with its reason."""
    shared = RuntimeError("out of resource: shared memory, Required: 163840\nHardware limit: 101376")
    run = Pass(
        {"norm": (f"{KERNELS}/norms.py", OSError("ptxas")), "rotary": (f"{KERNELS}/products.py", shared)}
    )
    with caplog.at_level(logging.WARNING, "sam3_runner"):
        find_supported_steps(run)
    assert run.runs == 3
    assert operations.plain_steps == {"norm", "gelu", "rotary"}
    first, second = caplog.messages
    assert first.startswith("the kernels for norm do not work here")
    assert first.endswith("more slowly: OSError: ptxas")
    assert second.startswith("the kernels for gelu, rotary do not work here")
    assert second.endswith(
        "RuntimeError: out of resource: shared memory, Required: 163840 Hardware limit: 101376"
    )


@pytest.mark.parametrize(
    "file", ["/app/sam3_runner/network/vision.py", "/app/torch/nn/attention.py", f"{KERNELS}/__init__.py"]
)
def test_other_errors_propagate(file: str) -> None:
    """An error that no kernel raised is not taken for one."""
    run = Pass({"norm": (file, RuntimeError("a bug"))})
    with pytest.raises(RuntimeError, match="a bug"):
        find_supported_steps(run)
    assert (run.runs, operations.plain_steps) == (1, set())


def test_kernel_that_fails_without_it() -> None:
    """A pass that fails in the same file without its kernels is not run for ever."""
    run = Pass({"no such step": (f"{KERNELS}/norms.py", RuntimeError("a bug"))})
    with pytest.raises(RuntimeError, match="a bug"):
        find_supported_steps(run)
    assert run.runs == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_full_memory_propagates(error: RuntimeError) -> None:
    """A full memory says nothing of a kernel, wherever it is noticed: the start is tried again later."""
    run = Pass({"norm": (f"{KERNELS}/norms.py", error)})
    with pytest.raises(RuntimeError) as raised:
        find_supported_steps(run)
    assert raised.value is error
    assert (run.runs, operations.plain_steps) == (1, set())


def test_each_step_belongs_to_one_file() -> None:
    """The table names steps that exist, each once."""
    steps = [step for steps in STEPS_BY_FILE.values() for step in steps]
    assert sorted(steps) == sorted(operations.STEPS - {"relu", "residual"})
