"""The complete error table: each of our exceptions has one code and one status, or never reaches a caller."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from contract import CODES, STATUSES, Failure, error_responses, framework_failure
from results import ResultsUnavailable, TaskInProgress
from sam3_runner import ModelNotLoaded

ROOT = Path(__file__).parents[2]
WENT_WRONG = "something went wrong on our side"

ANSWERED: dict[str, tuple[str, int]] = {
    "contract.errors.BoxRefusedError": ("INVALID_REQUEST", 400),
    "contract.errors.OverloadedError": ("OVERLOADED", 429),
    "contract.errors.TaskMismatchError": ("INVALID_REQUEST", 400),
    "contract.errors.TaskGivenUpError": ("INFERENCE_FAILED", 500),
    "sam3_runner.errors.DeadlineExceeded": ("DEADLINE_EXCEEDED", 504),
    "sam3_runner.errors.InferenceFailed": ("INFERENCE_FAILED", 500),
    "sam3_runner.errors.ModelNotLoaded": ("MODEL_NOT_LOADED", 503),
    "sam3_runner.errors.RunnerStopped": ("MODEL_NOT_LOADED", 503),
    "sam3_runner.errors.BoxOutsideImage": ("INVALID_REQUEST", 400),
    "sam3_runner.errors.MasksTooLarge": ("INVALID_REQUEST", 400),
    "sam3_runner.errors.PromptTooLong": ("INVALID_REQUEST", 400),
    "sam3_runner.errors.UnsupportedImage": ("UNSUPPORTED_IMAGE", 415),
    "sam3_runner.errors.DecoderFailed": ("INTERNAL_ERROR", 500),
    "storage.errors.ImageUrlInvalid": ("INVALID_REQUEST", 400),
    "storage.errors.ImageUrlForbidden": ("FORBIDDEN", 403),
    "storage.errors.ObjectNotFound": ("IMAGE_NOT_FOUND", 404),
    "storage.errors.ObjectTooLarge": ("FILE_TOO_LARGE", 413),
    "storage.errors.StorageUnavailable": ("STORAGE_UNAVAILABLE", 502),
    "results.errors.TaskNotFound": ("TASK_NOT_FOUND", 404),
    "results.errors.TaskInProgress": ("TASK_IN_PROGRESS", 409),
    "results.errors.AttemptLost": ("TASK_IN_PROGRESS", 409),
    "results.errors.AlreadySettled": ("TASK_IN_PROGRESS", 409),
    "results.errors.MetadataInvalid": ("INTERNAL_ERROR", 500),
    "results.errors.ResultsUnavailable": ("RESULTS_UNAVAILABLE", 502),
}
"""Exceptions that a request can end with: code and status of the answer."""

NOT_ANSWERED: dict[str, str] = {
    "contract.errors.Failure": "the answer itself",
    "contract.options.FieldError": "pydantic makes it a part of its own error",
    "sam3_runner.errors.SAM3Error": "a base class, not raised",
    "storage.errors.StorageError": "a base class, not raised",
    "results.errors.ResultsError": "a base class, not raised",
    "sam3_runner.errors.WeightsError": "stops the start, or the model's process",
    "sam3_runner.errors.HubUnavailable": "the model's process waits for the hub",
    "sam3_runner.errors.DeviceUnavailable": "stops the start, or the model's process",
    "sam3_runner.errors.DeviceFull": "the model's process waits for memory",
    "storage.errors.StorageMisconfigured": "stops the start",
    "results.errors.ResultsMisconfigured": "stops the start",
    "results.supabase_rest.ColumnMissing": "caught in results.supabase",
    "results.supabase_rest.InvalidUuid": "caught in results.supabase",
    "sam3_runner.errors.FeaturesNotHeld": "caught in pipeline",
    "sam3_runner.masks.nvrtc.KernelsUnavailable": "caught in sam3_runner.masks.draw",
    "storage.nofollow.SymlinkFound": "caught in storage.local",
    "storage.r2_retries.R2Error": "caught in storage.r2",
}
"""Exceptions that never reach a request, and why."""

ARGUMENTS: dict[str, tuple[object, ...]] = {
    "results.errors.TaskInProgress": ("a-task", 41.7),
    "storage.errors.ObjectTooLarge": (1000,),
}
"""Constructor arguments of exceptions that need more than a message."""


def defined_exceptions() -> set[str]:
    """The public exception classes of the contract and the three packages."""
    packages = ("contract", "sam3_runner", "storage", "results")
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    bases: dict[str, set[str]] = {}
    modules: dict[str, str] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                modules[node.name] = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def is_exception(name: str) -> bool:
        if name not in bases:
            return name.endswith(("Exception", "Error"))
        return any(is_exception(base) for base in bases[name] - {name})

    return {f"{modules[name]}.{name}" for name in bases if not name.startswith("_") and is_exception(name)}


def made(name: str) -> Exception:
    """An exception of this class."""
    module, _, kind = name.rpartition(".")
    error: Exception = getattr(import_module(module), kind)(*ARGUMENTS.get(name, ("a message",)))
    return error


def test_every_exception_is_in_one_table() -> None:
    """Every exception class is in exactly one of the two tables, so a new one must be added to one."""
    assert not ANSWERED.keys() & NOT_ANSWERED.keys()
    assert defined_exceptions() == ANSWERED.keys() | NOT_ANSWERED.keys()


@pytest.mark.parametrize("name", ANSWERED)
def test_answer_of_each_exception(name: str) -> None:
    """Each exception gives one code and one status; unlisted ones do not show their message."""
    error = made(name)
    failure = Failure.of(error)
    assert (failure.code, failure.status) == ANSWERED[name]
    unlisted = failure.code == "INTERNAL_ERROR" and type(error) not in CODES
    assert failure.message == (WENT_WRONG if unlisted else str(error))


def test_table_holds_nothing_else() -> None:
    """Apart from our exceptions only TimeoutError has a code."""
    listed = {f"{kind.__module__}.{kind.__name__}" for kind in CODES}
    assert listed - {"builtins.TimeoutError"} <= ANSWERED.keys()
    late = Failure.of(TimeoutError())
    assert (late.code, late.status) == ("DEADLINE_EXCEEDED", 504)
    assert late.message == "the request took too long"


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("private"), OSError("private"), KeyError("private"), Exception("private")]
)
def test_unknown_exception_hides_its_message(error: Exception) -> None:
    """A foreign exception gives 500 without its own message."""
    failure = Failure.of(error)
    assert (failure.code, failure.status, failure.message) == ("INTERNAL_ERROR", 500, WENT_WRONG)
    assert failure.headers == {}


def test_subclass_is_answered_as_its_base() -> None:
    """A subclass gives the code of its base class."""

    class Silent(ResultsUnavailable):
        pass

    assert Failure.of(Silent("no answer")).code == "RESULTS_UNAVAILABLE"


def test_failure_is_its_own_answer() -> None:
    """A Failure is its own answer; with_message changes only the message."""
    failure = Failure.of(TaskInProgress("a-task", 41.7))
    assert Failure.of(failure) is failure
    other = failure.with_message("other words")
    assert (other.code, other.status, other.message) == ("TASK_IN_PROGRESS", 409, "other words")
    assert other.headers == failure.headers


@pytest.mark.parametrize("name", ANSWERED)
def test_retry_after_is_sent_where_it_helps(name: str) -> None:
    """`Retry-After` is sent with 409, 429 and 503, in whole seconds of at least one."""
    failure = Failure.of(made(name))
    expected = failure.status in {409, 429, 503}
    assert ("Retry-After" in failure.headers) == expected
    if expected:
        assert int(failure.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(("lease_s", "header"), [(41.7, "42"), (0.2, "1"), (-3.0, "1")])
def test_retry_after_is_the_rest_of_the_lease(lease_s: float, header: str) -> None:
    """Retry-After of TASK_IN_PROGRESS is the remaining lease, at least one second."""
    assert Failure.of(TaskInProgress("a-task", lease_s)).headers["Retry-After"] == header


def test_body_of_a_failure() -> None:
    """The body has the fields of the contract."""
    assert Failure.of(ModelNotLoaded("the model is loading")).body("request-17").model_dump() == {
        "error": {"code": "MODEL_NOT_LOADED", "message": "the model is loading"},
        "request_id": "request-17",
    }


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *(
            (404, "NOT_FOUND"),
            (405, "METHOD_NOT_ALLOWED"),
            (500, "INTERNAL_ERROR"),
            (503, "MODEL_NOT_LOADED"),
        ),
        (418, "IM_A_TEAPOT"),
    ],
)
def test_answers_of_the_framework(status: int, code: str) -> None:
    """The framework's own errors get a code by their status."""
    failure = framework_failure(status, "GET" if status == 405 else None)
    assert (failure.code, failure.status) == (code, status)
    assert ("Retry-After" in failure.headers) == (status == 503)
    assert failure.headers.get("Allow") == ("GET" if status == 405 else None)


def documented() -> dict[str, set[int]]:
    """The statuses of each code in docs/contracts/api-contracts.md."""
    text = (ROOT / "docs" / "contracts" / "api-contracts.md").read_text()
    table = text.partition("| Code | Status |")[2]
    found: dict[str, set[int]] = {}
    for codes, statuses in re.findall(r"^\| ([A-Z_, ]+) \| ([\d, ]+) \|", table, re.MULTILINE):
        names, numbers = codes.split(", "), [int(each) for each in statuses.split(", ")]
        # "A, B | 404, 405" is a pair each, "A, B | 401" the same for both.
        for index, name in enumerate(names):
            found.setdefault(name, set()).update(numbers[index : index + 1] or numbers)
    return found


def test_document_has_every_code() -> None:
    """The document lists every code with its status, and no other code."""
    assert documented() == {code: {int(status)} for code, status in STATUSES.items()}


def test_routes_document_their_errors() -> None:
    """The description of a route lists its codes by status."""
    described = error_responses("AUTH_REQUIRED", "AUTH_INVALID", "MODEL_NOT_LOADED")
    assert {status: each["description"] for status, each in described.items()} == {
        401: "AUTH_REQUIRED, AUTH_INVALID",
        503: "MODEL_NOT_LOADED",
    }
    assert "Retry-After" in str(described[503]["headers"])
