"""Segments every picture of a bucket or a folder, on Ray Data."""
