"""What the simulation of the online system (fleet.py) is about: times, callers, losses, loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOTICED_S = 5.0
"""Until no call is sent to a lost host any more; assumed."""


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Measured times of one host, one prompt an image.

    Attributes:
        before_s: from the call to the pixels on the GPU: HTTP, claim, fetch, decoding, staging.
        pass_s: of a pass, whatever its size.
        image_s: of each image of a pass.
        after_s: from the model's answer to the settled row and the answer.
        max_batch: images of a pass.
        slots: tasks from their fetch to the model's answer at once.
        max_in_flight: tasks at once, waiting ones too (`MAX_IN_FLIGHT` of two API workers).
    """

    before_s: float
    pass_s: float
    image_s: float
    after_s: float
    max_batch: int = 8
    slots: int = 24
    max_in_flight: int = 1536

    def of_pass(self, images: int) -> float:
        """Time of a pass of so many images."""
        return self.pass_s + images * self.image_s

    @property
    def capacity_per_s(self) -> float:
        """Images a second in full passes."""
        return self.max_batch / self.of_pass(self.max_batch)


@dataclass(frozen=True, slots=True)
class Caller:
    """How the Edge sends a task.

    Attributes:
        name: in the table.
        deadline_s: of a direct call, its X-Deadline-Ms.
        retry_for_s: direct calls are repeated until so long after the arrival (a Worker's waitUntil: 30 s).
        queue_retries: after the direct calls the task goes to a queue, which delivers it once and retries
            it so many times; None: no queue.
        queue_delay_s: to the next delivery where the answer has no `Retry-After`.
        queue_deadline_s: of a call from the queue: REQUEST_TIMEOUT_S, which caps the Edge's 120 s.
    """

    name: str
    deadline_s: float
    retry_for_s: float = 0.0
    queue_retries: int | None = None
    queue_delay_s: float = 30.0
    queue_deadline_s: float = 60.0


CALLERS = {
    caller.name: caller
    for caller in (
        Caller("once", 25.0),
        Caller("direct", 22.0, retry_for_s=30.0),
        # examples/edge: one direct call, then the queue, with its `max_retries` and `retry_delay`.
        Caller("queue", 22.0, queue_retries=60),
    )
}


@dataclass(frozen=True, slots=True)
class Losses:
    """How hosts are lost, without notice and with their disks, and replaced.

    Attributes:
        per_host_hour: rate of losses of a host that serves; 0: none.
        at_s: in addition the first host is lost at this time.
        noticed_s: see `NOTICED_S`.
        replaced_s: lowest and highest time from the loss to the start of the next container (a new instance
            and the pull of its image), uniform between them.
        loading_s: from there until the model is ready: the weights' download and the start.
        answers_while_loading: a container that is loading gets calls too, and answers 503: its tunnel is
            open.
    """

    per_host_hour: float = 0.0
    at_s: float | None = None
    noticed_s: float = NOTICED_S
    replaced_s: tuple[float, float] = (600.0, 3600.0)
    loading_s: float = 89.0
    answers_while_loading: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to simulate.

    Attributes:
        hosts: with one GPU each.
        times: of each host.
        rate_per_s: mean rate of arrivals (Poisson) over all hosts.
        seconds: tasks arrive for so long; all of them are followed to their ends.
        caller: how the Edge sends them.
        losses: of hosts.
        clients: of a closed loop in place of arrivals: each sends its next task when the last has its
            answer.
        balance: who gets a call: a random host, or the one with the fewest calls in progress.
        lease_s: of a claim: REQUEST_TIMEOUT_S and a minute.
        exact_count: the number of arrivals is the rate's, not random too.
        warm_up_s: tasks that arrive before are not counted.
        runner_killed_s: when the model's process of the first host is killed; None: never.
        runner_restart_s: until it is ready again.
    """

    hosts: int
    times: ServiceTimes
    rate_per_s: float
    seconds: float
    caller: Caller = CALLERS["queue"]
    losses: Losses = Losses()
    clients: int = 0
    balance: Literal["random", "least"] = "random"
    lease_s: float = 120.0
    exact_count: bool = False
    warm_up_s: float = 0.0
    runner_killed_s: float | None = None
    runner_restart_s: float = 0.0
