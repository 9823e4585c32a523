"""The tables at the end of `sam3 predict`, and that of `sam3 doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam3_client.command_line.progress import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from commands.doctor import Check
    from sam3_client.command_line.predict import Run, Summary

MAX_FAILED = 20
"""Rows of pictures that failed; stderr has had all of them."""
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def show_summary(summary: Summary, run: Run) -> None:
    """Print what was done to stdout."""
    console = Console(highlight=False)
    if summary.failed:
        console.print(_failures(summary))
    if summary.found:
        console.print(_instances(summary))
    if summary.kept == summary.total:
        counts = [f"all {summary.total} pictures were done before"]
    else:
        counts = [f"{summary.done} of {summary.total} pictures done in {summary.time_s:.1f} s"]
    if 0 < summary.kept < summary.total:
        counts.append(f"{summary.kept} were done before")
    if summary.failed:
        counts.append(f"{len(summary.failed)} failed")
    if summary.not_done:
        counts.append(f"{summary.not_done} not done")
    if run.sources.left_out:
        counts.append(f"left out: {run.sources.left_out} with other endings than a picture's")
    console.print(Text(f"{', '.join(counts)}. Outputs: {shown(str(run.out.path))}"), soft_wrap=True)


def _instances(summary: Summary) -> Table:
    table = Table("prompt", title_justify="left")
    table.add_column("instances", justify="right")
    table.add_column("pictures with any", justify="right")
    for prompt, count in summary.found.items():
        table.add_row(Text(shown(prompt)), str(count), str(summary.found_in[prompt]))
    return table


def _failures(summary: Summary) -> Table:
    table = Table(title="failed", title_justify="left")
    table.add_column("picture", overflow="fold")
    table.add_column("why", overflow="fold")
    for name, reason in list(summary.failed.items())[:MAX_FAILED]:
        table.add_row(Text(shown(name)), Text(shown(reason)))
    more = len(summary.failed) - MAX_FAILED
    if more > 0:
        table.add_row("", f"and {more} more, named above")
    return table


def show_checks(checks: Sequence[Check]) -> None:
    """Print the doctor's table to stdout."""
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        found = Text(shown(check.finding))
        if check.mend:
            found.append(f"\n{shown(check.mend)}", "bold")
        table.add_row(check.name, Text(check.status, COLOURS[check.status]), found)
    Console(highlight=False).print(table)
