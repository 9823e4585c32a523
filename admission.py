"""Who gets an API worker's next slot, and how long a request would wait for one.

A slot spans the fetch of an image, its decoding and the model's answer. Slots are given to the users in
turn, and within a user to the earliest deadline. So one user's queue does not delay the others, and the
queues behind the slots (of the decoders, of the runner) stay short.

Everything here runs in one event loop and has no `await` between a check and its effect, except `Place.wait`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from bisect import bisect_left, insort
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from observability.metrics import QUEUE_SECONDS, TASKS_QUEUED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FURTHER_PROMPT_COST = 0.1
"""Of a prompt beside the first: 1.45 of 14.4 ms on an H100 (README.md), 0.08 of a request on 2 CPU cores."""

BATCHES_OF_SLOTS = 3
"""Batches' worth of slots over all API workers, for each runner: one batch is computed, one waits in the
runner, and one is fetched and decoded."""
MIN_SLOTS = 2

HEADROOM = 0.8
"""A request is admitted when its expected time is at most this part of its time: the rate changes, and
requests of other users may come before it."""
USER_SHARE = 4
"""One user may hold so many times the places that are left free, so that others always find one."""

RATE_WINDOW_S = 10.0
"""Measured time after which a measurement counts 1/e."""
MIN_MEASURED_S = 0.5
"""Measured time after which a rate counts: batches end together, and one alone says little."""
DEFAULT_RETRY_S = 2.0
"""To wait before the next try, where no rate is measured."""
MAX_RETRY_S = 60
"""The longest of these waits: the rate of the last seconds says nothing of later."""

Outcome = Literal["done", "late", "failed"]
"""How the use of a slot ended, for the rate.

- done: the model has worked for it.
- late: the slot was in use, but the model did not answer. Only its time counts.
- failed: it ended before the model, since the image is missing or damaged, the task was done already, or the
  place moved to another gate. It says nothing of the model: neither work nor time counts.
"""


def cost_of(prompts: int, tiles: int = 0) -> float:
    """The work of a request, in requests of one prompt without tiles: a tile is as much work as an image."""
    return (1 + tiles) * (1.0 + FURTHER_PROMPT_COST * (prompts - 1))


def slots_per_worker(max_batch: int, api_workers: int, runners: int = 1) -> int:
    """Slots of one API worker.

    Args:
        max_batch: requests in one pass of the model.
        api_workers: processes that share the runners.
        runners: processes of the model.
    """
    return max(MIN_SLOTS, math.ceil(BATCHES_OF_SLOTS * max_batch * runners / api_workers))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not admitted.

    Attributes:
        reason: for metrics: its deadline, the worker's memory, or the user's share of that.
        message: for the caller.
        retry_after_s: whole seconds, 1 or more.
    """

    reason: Literal["deadline", "in_flight", "user_share"]
    message: str
    retry_after_s: int


class Admission:
    """The requests that an API worker has in progress, and the gate that they pass.

    Args:
        slots: of the gate.
        max_in_flight: requests in progress at once.
    """

    def __init__(self, slots: int, max_in_flight: int) -> None:
        self.gate = FairGate(slots)
        self._max_in_flight = max_in_flight
        self._in_flight: Counter[str] = Counter()
        self._total = 0

    def check(self, place: Place) -> Refusal | None:
        """Why the request of `place` must not begin now; None where it may."""
        free = self._max_in_flight - self._total
        if free <= 0:
            message = f"{self._total} requests are in flight; try again later"
            return Refusal("in_flight", message, _retry_after_s(self.gate.drain_s()))
        own = self._in_flight[place.user_id]
        if own >= USER_SHARE * free:
            message = f"{own} requests of this user are in flight; try again later"
            return Refusal("user_share", message, _retry_after_s(self.gate.drain_s()))
        expected_s = self.gate.expected_s(place)
        bound_s = HEADROOM * (place.deadline_s - time.monotonic())
        if not expected_s or expected_s <= bound_s:
            return None
        message = f"the queue takes about {expected_s:.1f} s, too long for this request's deadline; try later"
        return Refusal("deadline", message, _retry_after_s(expected_s - bound_s))

    def begin(self, place: Place) -> None:
        """Count the request, and let it wait for its slot. `end` must follow."""
        self._in_flight[place.user_id] += 1
        self._total += 1
        place.join(self.gate)
        self._observe()

    def end(self, place: Place) -> None:
        """The request has ended, wherever it was."""
        place.leave()
        self._total -= 1
        self._in_flight[place.user_id] -= 1
        if not self._in_flight[place.user_id]:
            del self._in_flight[place.user_id]
        self._observe()

    def _observe(self) -> None:
        TASKS_QUEUED.set(self.gate.waiting)
        QUEUE_SECONDS.set(self.gate.drain_s() or 0.0)


def _retry_after_s(expected_s: float | None) -> int:
    return min(MAX_RETRY_S, max(1, math.ceil(DEFAULT_RETRY_S if expected_s is None else expected_s)))


class Place:
    """The place of one request: it waits for a slot of a gate, holds one, or neither.

    Whoever creates it must call `leave` at the end.

    Args:
        user_id: whose turn it takes.
        deadline_s: until when it waits, on the clock of `time.monotonic`.
        cost: its work, as of `cost_of`.
        order_s: sorts the places of one user, the lowest first; default: `deadline_s`.
    """

    def __init__(
        self, user_id: str, deadline_s: float, *, cost: float = 1.0, order_s: float | None = None
    ) -> None:
        self.user_id = user_id
        self.deadline_s = deadline_s
        self.cost = cost
        self.order_s = deadline_s if order_s is None else order_s
        self._gate: FairGate | None = None
        self._slot = asyncio.Event()

    @property
    def has_slot(self) -> bool:
        """It holds a slot."""
        return self._slot.is_set()

    def join(self, gate: FairGate) -> None:
        """Leave the gate before, and take a free slot of this one or wait for one."""
        self.leave()
        self._gate = gate
        gate.enter(self)

    async def wait(self) -> None:
        """Wait until it holds a slot. Raises TimeoutError when the deadline passes; it has left then."""
        try:
            async with asyncio.timeout(self.deadline_s - time.monotonic()):
                await self._slot.wait()
        except TimeoutError as error:
            self.leave()
            raise TimeoutError("the deadline passed while the task waited for its turn") from error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not counted against the deadline: a slow store is no overload."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.deadline_s += time.monotonic() - begun_s

    def correct_cost(self, cost: float) -> None:
        """Set its work once that is known. Only while it does not wait for a slot."""
        if self._gate is not None:
            self._gate.correct_cost(self, cost)
        self.cost = cost

    def take_slot(self) -> None:
        """For the gate: the place holds a slot from now on."""
        self._slot.set()

    def leave(self, outcome: Outcome = "failed") -> None:
        """Give the slot back, or stop waiting. Without effect where it does neither.

        Args:
            outcome: of the slot's use.
        """
        gate, self._gate = self._gate, None
        if gate is not None:
            held = self.has_slot
            self._slot.clear()
            gate.exit(self, held_slot=held, outcome=outcome)


class FairGate:
    """Slots that users get in turn; within a user by `Place.order_s`, then by arrival.

    Args:
        slots: held at once.
        now: the clock that measures the rate.
    """

    def __init__(self, slots: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._held_cost = 0.0
        self._holders: dict[Place, _Mark] = {}
        """The places that hold a slot, and when they got it."""
        self._users: dict[str, _Queue] = {}
        """The users who wait, in the order of their turns."""
        self._waiting, self._waiting_cost = 0, 0.0
        self._full_rate, self._rate = _Rate(), _Rate()
        """While somebody waits; while a slot is held."""
        self._now = now

    @property
    def has_free_slot(self) -> bool:
        """A slot is free, and so nobody waits."""
        return len(self._holders) < self._slots

    @property
    def waiting(self) -> int:
        """Places that wait."""
        return self._waiting

    def expected_s(self, place: Place) -> float | None:
        """Time until the work of `place` would be done if it entered now: its slot, then its own work.

        Counts what the fair order puts before it: of its own user the places before it, of each other user
        one turn for each of these and one more. 0 where no slot is held: whatever was measured in an outage,
        a request is tried. None where nothing is measured.
        """
        if not self._holders:
            return 0.0
        own = self._users.get(place.user_id)
        turns, ahead = (own.rank(place.order_s), own.cost_before(place.order_s)) if own else (0, 0.0)
        for user_id, queue in self._users.items():
            if user_id != place.user_id:
                ahead += queue.cost * min(1.0, (turns + 1) / len(queue))
        return self._time_of(self._held_cost + ahead + place.cost)

    def drain_s(self) -> float | None:
        """Time until all work that waits or is in progress would be done; None where nothing is measured."""
        return self._time_of(self._held_cost + self._waiting_cost)

    def enter(self, place: Place) -> None:
        """Give `place` a slot if one is free, else let it wait. Called by `Place.join`."""
        if self.has_free_slot:
            self._give(place)
        else:
            self._full_rate.begin(self._now())
            self._users.setdefault(place.user_id, _Queue()).add(place)
            self._waiting, self._waiting_cost = self._waiting + 1, self._waiting_cost + place.cost

    def exit(self, place: Place, *, held_slot: bool, outcome: Outcome) -> None:
        """Take the slot of `place`, or its place in the queue. Called by `Place.leave`."""
        if not held_slot:
            self._remove(place)
            return
        begun = self._holders.pop(place)
        self._held_cost -= place.cost
        for rate in (self._rate, self._full_rate):
            rate.count(place.cost if outcome == "done" else 0.0, self._now())
        if outcome == "failed":
            self._full_rate.forget_since(begun, share=1 / self._slots)
        if not self._holders:
            self._held_cost = 0.0  # not what rounding has left
            self._rate.end(self._now())
        if not self._users:
            return
        user_id, queue = next(iter(self._users.items()))
        following = queue.first()
        self._remove(following)
        if queue:  # the user's next turn comes after those of all others
            self._users[user_id] = self._users.pop(user_id)
        self._give(following)

    def correct_cost(self, holder: Place, cost: float) -> None:
        """Called by `Place.correct_cost`."""
        assert holder in self._holders
        self._held_cost += cost - holder.cost

    def _give(self, place: Place) -> None:
        self._rate.begin(self._now())
        self._holders[place] = self._full_rate.mark(self._now())
        self._held_cost += place.cost
        place.take_slot()

    def _remove(self, place: Place) -> None:
        queue = self._users[place.user_id]
        queue.remove(place)
        self._waiting, self._waiting_cost = self._waiting - 1, self._waiting_cost - place.cost
        if not queue:
            del self._users[place.user_id]
        if not self._users:
            self._waiting_cost = 0.0
            self._full_rate.end(self._now())

    def _time_of(self, cost: float) -> float | None:
        full_rate, rate = (each.per_s(self._now()) for each in (self._full_rate, self._rate))
        # Without a full gate the rate is what callers ask for. It is a lower bound, and corrects a full
        # gate's rate that is too low, for instance since an outage.
        return None if full_rate is None else cost / max(full_rate, rate or 0.0)


class _Queue:
    """The places of one user that wait, in their order."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Place]] = []
        self._numbers: dict[Place, int] = {}
        self.cost = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, place: Place) -> None:
        number = self._numbers[place] = next(_arrivals)
        insort(self._entries, (place.order_s, number, place))
        self.cost += place.cost

    def first(self) -> Place:
        return self._entries[0][2]

    def remove(self, place: Place) -> None:
        del self._entries[bisect_left(self._entries, (place.order_s, self._numbers.pop(place)))]
        self.cost -= place.cost

    def rank(self, order_s: float) -> int:
        """Places before a new one of this order."""
        return bisect_left(self._entries, (order_s, math.inf))

    def cost_before(self, order_s: float) -> float:
        """Cost of these places."""
        after = self._entries[self.rank(order_s) :]  # few: most come in the order of their deadlines
        return self.cost - sum(place.cost for _, _, place in after)


_arrivals = itertools.count()


@dataclass(frozen=True, slots=True)
class _Mark:
    """A moment of a measurement.

    Attributes:
        total_s: measured time until then.
        decayed_s: the same with its decay.
    """

    total_s: float
    decayed_s: float


class _Rate:
    """Work done a second, of the time between `begin` and `end`.

    Both sums decay with this time, so that their quotient is of the last `RATE_WINDOW_S` of it.
    """

    def __init__(self) -> None:
        self._all = _Mark(0.0, 0.0)
        self._cost = 0.0
        self._measured_s = 0.0
        self._since_s: float | None = None

    def begin(self, now_s: float) -> None:
        """Measure from now on, unless it is measured already."""
        if self._since_s is None:
            self._since_s = now_s

    def count(self, cost: float, now_s: float) -> None:
        """Work was done."""
        if self._since_s is None:
            return
        passed_s, self._since_s = now_s - self._since_s, now_s
        kept = math.exp(-passed_s / RATE_WINDOW_S)
        self._all = _Mark(self._all.total_s + passed_s, self._all.decayed_s * kept + passed_s)
        self._cost = self._cost * kept + cost
        self._measured_s = self._measured_s * kept + passed_s

    def mark(self, now_s: float) -> _Mark:
        """This moment, for `forget_since`."""
        self.count(0.0, now_s)
        return self._all

    def forget_since(self, mark: _Mark, share: float) -> None:
        """Take back a share of the time that was measured since `mark`, as much as has not decayed."""
        kept = math.exp((mark.total_s - self._all.total_s) / RATE_WINDOW_S)
        measured_s = self._all.decayed_s - mark.decayed_s * kept
        self._measured_s = max(0.0, self._measured_s - share * measured_s)

    def end(self, now_s: float) -> None:
        """Measure no more until `begin`."""
        self.count(0.0, now_s)
        self._since_s = None

    def per_s(self, now_s: float) -> float | None:
        """The rate; None before enough is measured."""
        measured_s = self._measured_s + (0.0 if self._since_s is None else now_s - self._since_s)
        return self._cost / measured_s if self._cost and measured_s >= MIN_MEASURED_S else None
