"""Callers of the server: the demo, which does the Edge's steps on one machine, and an example Edge."""
