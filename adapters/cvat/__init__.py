"""Auto-annotation functions for CVAT: `detection.py` finds labels, `interaction.py` what is in a box.

`cvat-cli` loads each by `--function-file`; docs/adapters/cvat.md says how.
"""
