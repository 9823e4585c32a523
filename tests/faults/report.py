"""What a run tells: a line now and then, a summary, and all that is known of a violation."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.faults.diary import clock_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.faults.checks import Checks
    from tests.faults.diary import Violation
    from tests.faults.stage import Stage
    from tests.faults.watchers import Prober

MOST_TOLD = 8
LOG_LINES = 25


def summary(stage: Stage, checks: Checks, probers: Iterable[Prober], left_out: Sequence[str]) -> str:
    """The run in numbers."""
    answers = Counter(answer.code for task in stage.tasks for answer in task.answers)
    times_s = sorted(time_s for prober in probers for time_s in prober.times_s)
    excused = sum(prober.excused for prober in probers)
    kills = Counter(task.kills for task in stage.tasks if task.is_poison)
    lines = [
        f"tasks: {len(stage.tasks)}",
        _table("ends", checks.ends),
        _table("answers", answers),
        _table("faults", stage.diary.counts()),
        f"kills of a poison task: {dict(sorted(kills.items()))} (kills: tasks)",
        f"exceptions allowed: {dict(checks.exceptions) or 'none'}",
        f"starts of the servers: { {server.name: server.starts for server in stage.servers.values()} }",
    ]
    if times_s:
        at = times_s[min(len(times_s) - 1, int(len(times_s) * 0.99))]
        lines.append(
            f"probes: {len(times_s)} while a server was up, 99th percentile {at:.2f} s, worst "
            f"{times_s[-1]:.2f} s ({excused} while it was not)"
        )
    lines += [f"left out: {each}" for each in left_out]
    return "\n".join(lines)


def story(stage: Stage, violations: Sequence[Violation], *, seed: int, number: int, again: str) -> str:
    """What is known of violations, and how to see them again."""
    lines = [f"VIOLATED in round {number} of seed {seed}; to repeat: {again}"]
    counts = Counter(violation.invariant for violation in violations)
    lines += [f"  {times} x {invariant}" for invariant, times in counts.items()]
    lines += [
        "faults of the round:",
        *(f"  {note}" for note in stage.diary.notes[stage.diary.first_of_round :]),
    ]
    for violation in violations[:MOST_TOLD]:
        lines.append(f"- {violation.invariant}: {violation.text}")
        if violation.task_id is not None:
            lines += _of_task(stage, violation.task_id)
    return "\n".join(lines)


def _of_task(stage: Stage, task_id: str) -> list[str]:
    lines = []
    for task in stage.tasks:
        if task.task_id == task_id:
            lines.append(f"  {task}; kills {task.kills}; on a file: {task.seen_on_file}")
            lines += [
                f"    {clock_time(a.at_s)} {a.server} answered {a.code} {a.message}" for a in task.answers
            ]
    for _, _, at, who, what, status, attempt, content in stage.execute(
        "select * from history where id = %s order by number", task_id
    ):
        lines.append(
            f"    {at:%H:%M:%S.%f} {who} {what} -> {status}, attempt {attempt}, content {content[:8]}"
        )
    for server in stage.servers.values():
        if server.log_path.exists():
            log = server.log_path.read_text(errors="replace").splitlines()
            lines += [f"    {server.name}: {line}" for line in log if task_id in line][-LOG_LINES:]
    return lines


def _table(title: str, counts: Counter[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {times:6d}  {what}" for what, times in sorted(counts.items()))])
