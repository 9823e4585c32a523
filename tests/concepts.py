"""Prompts of text for the model."""

from __future__ import annotations

from sam3_runner.prompts import ConceptPrompt


def concepts(*texts: str) -> list[ConceptPrompt]:
    """A prompt for each text."""
    return [ConceptPrompt(text) for text in texts]
