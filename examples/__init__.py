"""Callers of the server: the demo, which plays the Edge on one machine."""
