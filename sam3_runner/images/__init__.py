"""Reads and decodes untrusted image files, resizes them to the model's square, encodes masks. No torch."""
