"""The command that downloads ahead of the start; what it downloads is tested with sam3_runner."""

from __future__ import annotations

import os

import pytest

from commands.download_weights import main


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SAM3_WEIGHTS_PATH", "demo", "demo is embedded: there is nothing to download"),
        ("SAM3_HF_REPO", "sam3", "SAM3_HF_REPO must be owner/name"),
    ],
)
def test_nothing_to_do_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """The demo and wrong settings end the command with a sentence and the exit code 1."""
    monkeypatch.setenv("ENV_FILE", os.devnull)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=sentence):
        main()
