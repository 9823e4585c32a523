"""The command that downloads the weights; tests/sam3_runner tests the download itself."""

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
def test_demo_and_wrong_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """The demo and wrong settings end the command with an error message and exit status 1."""
    monkeypatch.setenv("ENV_FILE", os.devnull)
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=sentence):
        main()
