"""The report of a run: a summary, and the details of violations."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.faults.fault_log import clock_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.faults.checks import Checks
    from tests.faults.fault_log import Violation
    from tests.faults.system import System
    from tests.faults.watchers import Prober

MAX_VIOLATIONS = 8
LOG_LINES = 25


def summary(
    system: System, checks: Checks, probers: Iterable[Prober], impossible_faults: Sequence[str]
) -> str:
    """The run in numbers."""
    answers = Counter(answer.code for task in system.tasks for answer in task.answers)
    times_s = sorted(time_s for prober in probers for time_s in prober.times_s)
    excused = sum(prober.excused for prober in probers)
    kills = Counter(task.kills for task in system.tasks if task.is_poison)
    lines = [
        f"tasks: {len(system.tasks)}",
        _table("ends", checks.ends),
        _table("answers", answers),
        _table("faults", system.fault_log.counts()),
        f"kills of a poison task: {dict(sorted(kills.items()))} (kills: tasks)",
        f"exceptions allowed: {dict(checks.exceptions) or 'none'}",
        f"starts of the servers: { {server.name: server.starts for server in system.servers.values()} }",
    ]
    if times_s:
        at = times_s[min(len(times_s) - 1, int(len(times_s) * 0.99))]
        lines.append(
            f"probes: {len(times_s)} while a server was up, 99th percentile {at:.2f} s, worst "
            f"{times_s[-1]:.2f} s ({excused} while it was down)"
        )
    lines += [f"not injected: {each}" for each in impossible_faults]
    return "\n".join(lines)


def details(system: System, violations: Sequence[Violation], *, seed: int, number: int, again: str) -> str:
    """The details of violations, and the command to repeat them."""
    lines = [f"VIOLATED in round {number} of seed {seed}; to repeat: {again}"]
    counts = Counter(violation.invariant for violation in violations)
    lines += [f"  {times} x {invariant}" for invariant, times in counts.items()]
    lines += [
        "faults of the round:",
        *(f"  {note}" for note in system.fault_log.notes[system.fault_log.first_of_round :]),
    ]
    for violation in violations[:MAX_VIOLATIONS]:
        lines.append(f"- {violation.invariant}: {violation.text}")
        if violation.task_id is not None:
            lines += _of_task(system, violation.task_id)
    return "\n".join(lines)


def _of_task(system: System, task_id: str) -> list[str]:
    lines = []
    for task in system.tasks:
        if task.task_id == task_id:
            lines.append(f"  {task}; kills {task.kills}; in an outbox file: {task.seen_on_file}")
            lines += [
                f"    {clock_time(a.at_s)} {a.server} answered {a.code} {a.message}" for a in task.answers
            ]
    for _, _, at, who, what, status, attempt, content in system.execute(
        "select * from history where id = %s order by number", task_id
    ):
        lines.append(
            f"    {at:%H:%M:%S.%f} {who} {what} -> {status}, attempt {attempt}, content {content[:8]}"
        )
    for server in system.servers.values():
        if server.log_path.exists():
            log = server.log_path.read_text(errors="replace").splitlines()
            lines += [f"    {server.name}: {line}" for line in log if task_id in line][-LOG_LINES:]
    return lines


def _table(title: str, counts: Counter[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {times:6d}  {what}" for what, times in sorted(counts.items()))])
