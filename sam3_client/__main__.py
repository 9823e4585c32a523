"""`python -m sam3_client` is the command `sam3`."""

from __future__ import annotations

from sam3_client.command_line import main

if __name__ == "__main__":
    main()
