"""How much of a machine Ray's store takes."""

from __future__ import annotations

import math

import pytest

from bulk.cluster import MAX_STORE_SHARE, STORE_BYTES_A_CPU, Store

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("cpus", "memory_bytes", "shared_bytes", "size_bytes"),
    [
        pytest.param(16, 128 * GB, 64 * GB, 16 * STORE_BYTES_A_CPU, id="room for all"),
        pytest.param(64, 16 * GB, 500 * GB, MAX_STORE_SHARE * 16 * GB, id="a container with little memory"),
        pytest.param(64, 500 * GB, 8 * GB, 7.2 * GB, id="as much as shared memory has"),
        pytest.param(64, 500 * GB, 64_000_000, 64 * STORE_BYTES_A_CPU, id="Docker's shared memory"),
        pytest.param(8, 16 * GB, math.inf, 8 * STORE_BYTES_A_CPU, id="not Linux"),
    ],
)
def test_store_fits_the_machine(
    cpus: int, memory_bytes: float, shared_bytes: float, size_bytes: float
) -> None:
    """By the CPUs, within the memory of the container, and in shared memory where that has room."""
    assert Store.of(cpus, memory_bytes, shared_bytes).size_bytes == size_bytes


def test_store_in_files_is_told() -> None:
    """Blocks that go through /tmp are a sentence, which says what gives them memory."""
    warning = Store.of(64, 500 * GB, 64_000_000).warning
    assert warning is not None
    assert "has room for 0.1 GB of 17.2: files and results go through" in warning
    assert warning.endswith("with Docker, --shm-size=18g makes room")
    assert Store.of(64, 500 * GB, 8 * GB).warning is None
