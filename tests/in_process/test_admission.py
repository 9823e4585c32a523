"""The gate under random joins, cancellations and ends, and its estimate of a request's time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from admission import (
    DEFAULT_RETRY_S,
    MAX_RETRY_S,
    MIN_MEASURED_S,
    USER_SHARE,
    Admission,
    FairGate,
    Place,
    cost_of,
    slots_per_worker,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admission import Outcome

USERS = ("ann", "bob", "cy", "di")
FAR_S = 1e9
users = st.sampled_from(USERS)
orders = st.integers(0, 5).map(float)
costs = st.integers(1, 10).map(cost_of)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Gate(RuleBasedStateMachine):
    """Places that join, end, and give up in any order."""

    @initialize(slots=st.integers(1, 4))
    def open(self, slots: int) -> None:
        self.slots = slots
        self.gate = FairGate(slots)
        self.held: list[Place] = []
        self.waiting: list[Place] = []
        """In the order of arrival."""
        self.turns: dict[str, Counter[str]] = {}
        """By user who waits: the turns of others since its last one."""

    @rule(user=users, order_s=orders, cost=costs)
    def join(self, user: str, order_s: float, cost: float) -> None:
        place = Place(user, FAR_S, cost=cost, order_s=order_s)
        place.join(self.gate)
        (self.held if place.has_slot else self.waiting).append(place)
        if not place.has_slot:
            self.turns.setdefault(user, Counter())

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.held))
        self.held.remove(place)
        place.leave()
        place.leave()  # the second time has no effect
        served = [each for each in self.waiting if each.has_slot]
        assert len(served) == min(1, len(self.waiting))
        for each in served:
            self._check_turn(each)

    def _check_turn(self, served: Place) -> None:
        own = [each for each in self.waiting if each.user_id == served.user_id]
        assert served is min(own, key=lambda each: each.order_s)  # of equal ones the first to arrive
        self.waiting.remove(served)
        self.held.append(served)
        self._forget_users_without_places()
        for user, turns in self.turns.items():
            if user == served.user_id:
                turns.clear()
            else:
                turns[served.user_id] += 1
                assert turns[served.user_id] == 1, "a user had two turns while another waited for one"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(place)
        place.leave()
        self._forget_users_without_places()

    def _forget_users_without_places(self) -> None:
        waiting = {each.user_id for each in self.waiting}
        self.turns = {user: turns for user, turns in self.turns.items() if user in waiting}

    @invariant()
    def no_slot_is_lost(self) -> None:
        if hasattr(self, "gate"):
            assert all(each.has_slot for each in self.held)
            assert not any(each.has_slot for each in self.waiting)
            assert self.gate.waiting == len(self.waiting)
            assert len(self.held) <= self.slots
            assert len(self.held) == self.slots or not self.waiting
            assert self.gate.has_free_slot == (len(self.held) < self.slots)


TestGate = Gate.TestCase
TestGate.settings = settings(max_examples=200, deadline=None)


async def hold(gate: FairGate, user: str, steps: int) -> None:
    place = Place(user, time.monotonic() + 60)
    place.join(gate)
    try:
        await place.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
    finally:
        place.leave()


@given(
    slots=st.integers(1, 3),
    requests=st.lists(st.tuples(users, st.integers(0, 4)), max_size=20),
    cancelled=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 6)), max_size=20),
)
def test_cancelled_requests_lose_no_slot(
    slots: int, requests: Sequence[tuple[str, int]], cancelled: Sequence[tuple[int, int]]
) -> None:
    """Whenever requests are cancelled, also as they get their slot, all slots are free in the end."""

    async def run() -> None:
        gate = FairGate(slots)
        tasks = [asyncio.create_task(hold(gate, *each)) for each in requests]
        for index, steps in cancelled:
            for _ in range(steps):
                await asyncio.sleep(0)
            if index < len(tasks):
                tasks[index].cancel()
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert {type(each) for each in ended} <= {type(None), asyncio.CancelledError}
        assert gate.waiting == 0
        free = [Place("ann", FAR_S) for _ in range(slots + 1)]
        for place in free:
            place.join(gate)
        assert [place.has_slot for place in free] == [True] * slots + [False]

    asyncio.run(run())


@pytest.mark.anyio
async def test_deadline_ends_the_wait() -> None:
    """A place whose deadline passes leaves the gate, and the next one is served."""
    gate = FairGate(1)
    holder, following = Place("ann", FAR_S), Place("ann", FAR_S)
    late = Place("ann", time.monotonic() + 0.01)
    for place in (holder, late, following):
        place.join(gate)
    with pytest.raises(TimeoutError, match="deadline passed while the task waited"):
        await late.wait()
    holder.leave()
    await following.wait()
    assert (late.has_slot, following.has_slot, gate.waiting) == (False, True, 0)


@pytest.mark.anyio
async def test_place_moves_to_another_gate() -> None:
    """A place that joins another gate gives its slot to the next one of the first."""
    first, second = FairGate(1), FairGate(1)
    place, following = Place("ann", FAR_S), Place("bob", FAR_S)
    place.join(first)
    following.join(first)
    place.join(second)
    assert place.has_slot
    assert following.has_slot
    assert not second.has_free_slot


def test_paused_time_is_not_counted() -> None:
    """The deadline moves by the time in which the clock was stopped."""
    place = Place("ann", 100.0)
    with place.paused():
        before_s = time.monotonic()
        while time.monotonic() == before_s:
            pass
    assert place.deadline_s > 100.0


# The estimate.


def measured_gate(slots: int, clock: Clock, seconds_each: float) -> tuple[FairGate, list[Place]]:
    """A gate whose slots are held, and that has measured `seconds_each` for each unit of cost."""
    gate = FairGate(slots, now=clock)
    held = [Place("old", FAR_S) for _ in range(slots)]
    waits = Place("old", FAR_S)
    for place in (*held, waits):
        place.join(gate)
    while gate.drain_s() is None:
        clock.now_s += seconds_each
        follower = Place("old", FAR_S)
        follower.join(gate)  # somebody waits all the time
        held.pop(0).leave("done")
        held.append(waits)
        waits = follower
    waits.leave()
    return gate, held


@given(
    slots=st.integers(1, 4),
    waiting=st.lists(st.tuples(users, orders), max_size=25),
    new=st.tuples(users, orders),
    seconds_each=st.floats(0.01, 1.0),
)
@settings(deadline=None)
def test_expected_time_is_what_the_fair_order_takes(
    slots: int,
    waiting: Sequence[tuple[str, float]],
    new: tuple[str, float],
    seconds_each: float,
) -> None:
    """Without new arrivals, a request is done when it was expected, or earlier by one turn a user."""
    clock = Clock()
    gate, held = measured_gate(slots, clock, seconds_each)
    places = [Place(user, FAR_S, order_s=order_s) for user, order_s in waiting]
    for place in places:
        place.join(gate)
    mine = Place(new[0], FAR_S, order_s=new[1])
    expected_s = gate.expected_s(mine)
    assert expected_s is not None
    mine.join(gate)
    done = 0
    running = list(held)
    while not mine.has_slot:
        running.pop(0).leave("done")
        done += 1
        running += [each for each in (*places, mine) if each.has_slot and each not in running]
        places = [each for each in places if not each.has_slot]
    until_done = done + slots
    others = len({user for user, _ in waiting} - {new[0]})
    assert until_done - 1e-6 <= expected_s / seconds_each * 1.0001 <= until_done + others + 1.001


def test_new_user_does_not_wait_for_anothers_queue() -> None:
    """A user without a queue expects one turn of each other user, not the whole queue."""
    clock = Clock()
    gate, _ = measured_gate(2, clock, 0.1)
    for _ in range(100):
        Place("ann", FAR_S).join(gate)
    same, other = gate.expected_s(Place("ann", FAR_S)), gate.expected_s(Place("bob", FAR_S))
    assert same == pytest.approx(0.1 * (2 + 100 + 1))
    assert other == pytest.approx(0.1 * (2 + 1 + 1))


def test_ten_prompts_weigh_more() -> None:
    """A request of ten prompts takes almost twice the time of one."""
    clock = Clock()
    gate, _ = measured_gate(2, clock, 0.1)
    ten = gate.expected_s(Place("ann", FAR_S, cost=cost_of(10)))
    assert ten == pytest.approx(0.1 * (2 + 1.9))


def test_idle_time_is_not_measured() -> None:
    """The rate is of the time in which somebody waited."""
    clock = Clock()
    gate, _ = measured_gate(1, clock, 0.1)
    before_s = gate.drain_s()
    clock.now_s += 3600
    assert gate.drain_s() == before_s


def test_stalled_gate_expects_more() -> None:
    """While nothing ends and somebody waits, the rate sinks."""
    clock = Clock()
    gate, _ = measured_gate(1, clock, 0.1)
    Place("ann", FAR_S).join(gate)
    before_s = gate.drain_s()
    assert before_s is not None
    clock.now_s += 60
    after_s = gate.drain_s()
    assert after_s is not None
    assert after_s > 10 * before_s


def test_nothing_is_measured_at_first() -> None:
    """Without a measurement there is no estimate; a short one is none."""
    clock = Clock()
    gate = FairGate(1, now=clock)
    first, second, third = (Place("ann", FAR_S) for _ in range(3))
    for place in (first, second, third):
        place.join(gate)
    assert gate.expected_s(Place("ann", FAR_S)) is None
    clock.now_s += MIN_MEASURED_S / 2
    first.leave("done")
    assert gate.expected_s(Place("ann", FAR_S)) is None
    clock.now_s += MIN_MEASURED_S
    second.leave("done")
    assert gate.expected_s(Place("ann", FAR_S)) is not None


@pytest.mark.parametrize(
    ("max_batch", "workers", "runners", "slots"),
    [(8, 2, 1, 12), (8, 2, 8, 96), (8, 5, 1, 5), (2, 64, 1, 2)],
)
def test_slots_of_a_worker(max_batch: int, workers: int, runners: int, slots: int) -> None:
    """All workers together have three batches' worth of slots for each runner."""
    assert slots_per_worker(max_batch, workers, runners) == slots


# Admission.


def deadline(seconds: float) -> float:
    return time.monotonic() + seconds


@pytest.mark.anyio
async def test_hard_bound_and_its_share() -> None:
    """One user holds most of MAX_IN_FLIGHT at most; others fill the rest."""
    admission = Admission(2, 10)
    places = []
    while admission.check(Place("ann", deadline(60))) is None:
        places.append(Place("ann", deadline(60)))
        admission.begin(places[-1])
    assert len(places) == 8
    assert len(places) <= USER_SHARE * (10 - len(places))
    refusal = admission.check(Place("ann", deadline(60)))
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("user_share", DEFAULT_RETRY_S)
    for user in ("bob", "cy"):
        place = Place(user, deadline(60))
        assert admission.check(place) is None
        admission.begin(place)
        places.append(place)
    refusal = admission.check(Place("di", deadline(60)))
    assert refusal is not None
    assert refusal.reason == "in_flight"
    for place in places:
        admission.end(place)
    assert admission.check(Place("ann", deadline(60))) is None
    assert admission.gate.has_free_slot


@pytest.mark.anyio
async def test_deadline_that_cannot_be_met() -> None:
    """A request is refused when its expected time is too long, with the time after which it would not be."""
    clock = Clock()
    admission = Admission(1, 1000)
    admission.gate, _ = measured_gate(1, clock, 1.0)
    for _ in range(9):
        Place("ann", FAR_S, order_s=0.0).join(admission.gate)
    assert admission.check(Place("ann", deadline(20))) is None
    assert admission.check(Place("bob", deadline(5))) is None
    refusal = admission.check(Place("ann", deadline(5)))
    assert refusal is not None
    assert refusal.reason == "deadline"
    # 11 s of work, of which it could wait for 4.
    assert refusal.retry_after_s in {7, 8}
    assert "about 11.0 s" in refusal.message
    for _ in range(1000):
        Place("ann", FAR_S, order_s=0.0).join(admission.gate)
    refusal = admission.check(Place("ann", deadline(5)))
    assert refusal is not None
    assert refusal.retry_after_s == MAX_RETRY_S


@pytest.mark.anyio
async def test_rate_of_an_outage_is_corrected() -> None:
    """A rate that was measured in an outage refuses no request when none is in progress, and is corrected."""
    clock = Clock()
    admission = Admission(4, 1000)
    admission.gate, held = measured_gate(4, clock, 100.0)
    for place in held[1:]:
        place.leave("done")
    assert admission.check(Place("ann", deadline(20))) is not None
    held[0].leave("done")
    for _ in range(10):
        assert admission.check(Place("ann", deadline(20))) is None
        place = Place("ann", deadline(20))
        place.join(admission.gate)
        clock.now_s += 0.1
        place.leave("done")
    both = [Place("ann", deadline(20)) for _ in range(2)]
    for place in both:
        assert admission.check(place) is None
        place.join(admission.gate)


def test_idle_server_knows_its_rate() -> None:
    """Requests that come one at a time do not lower the rate that a full gate has had."""
    clock = Clock()
    gate, held = measured_gate(4, clock, 0.1)
    for place in held:
        place.leave("done")
    for _ in range(100):
        place = Place("ann", FAR_S)
        place.join(gate)
        clock.now_s += 1.0
        place.leave("done")
    Place("ann", FAR_S).join(gate)
    assert gate.drain_s() == pytest.approx(0.1)


def test_late_work_is_not_counted() -> None:
    """Slots whose work came too late do not raise the rate."""
    clock = Clock()
    gate, held = measured_gate(2, clock, 0.1)
    places = [Place("ann", FAR_S) for _ in range(50)]
    for place in places:
        place.join(gate)
    before_s = gate.expected_s(Place("ann", FAR_S))
    assert before_s is not None
    for place in (*held, *places[:20]):
        place.leave("late")
    after_s = gate.expected_s(Place("ann", FAR_S))
    assert after_s == pytest.approx(before_s * (50 - 22 + 2 + 1) / (50 + 2 + 1))


def run_full(gate: FairGate, clock: Clock, requests: Sequence[tuple[Outcome, float]]) -> None:
    """Run requests through the gate, all of which wait at once; each holds its slot for so many seconds."""
    places = {Place("ann", FAR_S): request for request in requests}
    for place in places:
        place.join(gate)
    ends_s: dict[Place, float] = {}
    while places:
        for place, (_, hold_s) in places.items():
            if place.has_slot:
                ends_s.setdefault(place, clock.now_s + hold_s)
        first = min(ends_s, key=ends_s.__getitem__)
        clock.now_s = ends_s.pop(first)
        first.leave(places.pop(first)[0])


def seconds_each(gate: FairGate) -> float | None:
    """The time of one request, as the gate estimates it."""
    place = Place("ann", FAR_S)
    place.join(gate)
    estimate_s = gate.drain_s()
    place.leave()
    return estimate_s


@pytest.mark.parametrize("failed_s", [0.001, 0.4, 5.0])
def test_failures_among_others_change_no_rate(failed_s: float) -> None:
    """The rate is that of the requests that reach the model, however fast the others fail."""
    clock = Clock()
    gate = FairGate(4, now=clock)
    run_full(gate, clock, [("done", 0.4), ("failed", failed_s)] * 100)
    assert seconds_each(gate) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(("failed_s", "estimate_s"), [(0.001, pytest.approx(0.1, rel=0.1)), (5.0, None)])
def test_failures_alone_change_no_rate(failed_s: float, estimate_s: float | None) -> None:
    """A burst of failures leaves the rate as it was; after a minute of them it is unknown."""
    clock = Clock()
    gate = FairGate(4, now=clock)
    run_full(gate, clock, [("done", 0.4)] * 100)
    run_full(gate, clock, [("failed", failed_s)] * 60)
    assert seconds_each(gate) == estimate_s


def test_slots_that_fail_together() -> None:
    """While all slots are stuck the rate sinks; when they fail it is as before."""
    clock = Clock()
    gate = FairGate(4, now=clock)
    run_full(gate, clock, [("done", 0.4)] * 100)
    stuck = [Place("ann", FAR_S) for _ in range(5)]
    for place in stuck:
        place.join(gate)
    clock.now_s += 10.0
    sunk_s = gate.drain_s()
    assert sunk_s is not None
    assert sunk_s > 5 * 0.1 * 1.5
    for place in stuck:
        place.leave("failed")
    assert seconds_each(gate) == pytest.approx(0.1, rel=0.1)
