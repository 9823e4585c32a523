"""The documentation as a site; see docs/decisions/docs.md."""
