"""Finds, downloads and reads a checkpoint. Only `load.py` imports torch when it is imported."""
