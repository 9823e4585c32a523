"""The claim and the end of a task, as the tests of all result stores use them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from results import Claim

if TYPE_CHECKING:
    from results import ResultStore, Task

MASK_URL = "https://masks.example/0.png"
METADATA: dict[str, object] = {"confidence": 0.93, "results": [{"labels": ["cat"], "box": [1.5, 2, 3, 4]}]}


async def claimed(store: ResultStore, task: Task) -> Claim:
    """The claim of a new attempt."""
    claim = await store.claim(task, str(uuid4()))
    assert isinstance(claim, Claim)
    return claim


async def finish(store: ResultStore, claim: Claim) -> None:
    """End the claim's task as done."""
    await store.update_result(claim.task_id, MASK_URL, ["cat"], METADATA, attempt_id=claim.attempt_id)
