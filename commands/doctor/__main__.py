"""`python -m commands.doctor`: the checks as plain lines. Exit status 1: one has failed."""

from __future__ import annotations

import argparse
import logging
import sys

from commands.doctor import all_checks

DEFAULT_PORT = 3000


def main() -> int:
    """Run and print all checks."""
    parser = argparse.ArgumentParser(prog="python -m commands.doctor", description=__doc__)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="that the server is to listen on")
    port = parser.parse_args().port
    logging.disable()  # stores log what the checks say
    failed = False
    for check in all_checks(port):
        failed |= check.status == "failed"
        mend = f"\n{'':27}{check.mend}" if check.mend else ""
        print(f"{check.status:8} {check.name:18}{check.finding}{mend}", flush=True)  # noqa: T201 - a command
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
