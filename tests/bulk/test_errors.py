"""The errors of a bulk run, as they reach a command and other processes."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest

from bulk import errors
from bulk.errors import BulkError, PictureError, RunError
from sam3_client.command_line import errors as of_command_line

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCES: list[Callable[[str], RunError]] = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, RunError) and kind is not RunError
]
ALL = [
    PictureError("NOT_FOUND", "no object has this key"),
    RunError("The sentence.", 7),
    *(kind("The sentence.") for kind in SENTENCES),
]


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_errors_cross_processes(error: BulkError) -> None:
    """Ray pickles the errors of its workers: type, fields and text arrive."""
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - made above
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)
    assert str(arrived) == str(error)


def test_exit_codes_are_those_of_the_command_line() -> None:
    """A shell sees the same code for the same kind of failure, from `sam3 bulk` and from `sam3 predict`."""
    assert (errors.SOME_FAILED, errors.USAGE, errors.UNAVAILABLE) == (
        of_command_line.SOME_FAILED,
        of_command_line.USAGE,
        of_command_line.SERVER,
    )
    codes = {error.exit_code for error in ALL if isinstance(error, RunError) and type(error) is not RunError}
    assert codes == {errors.USAGE, errors.UNAVAILABLE}


def test_text_of_an_error_is_its_sentence() -> None:
    """What a user reads has no tuple and no class name."""
    assert str(errors.StoreFull("The bucket is full.")) == "The bucket is full."
    assert str(PictureError("TOO_LARGE", "has more than 5 bytes")) == "TOO_LARGE: has more than 5 bytes"
