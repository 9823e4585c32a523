"""Who may import whom: the directions that keep the parts apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sam3_runner", "storage", "results")
TOP_MODULES = {path.stem for path in ROOT.glob("*.py")}
OURS = TOP_MODULES | set(PACKAGES) | {"training", "benchmarks", "examples", "tests"}
SERVED = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))])

ALLOWED = {
    **{package: {package} for package in PACKAGES},
    "setting_text": set(),
    "settings": {"setting_text"},
    "process_identity": set(),
    "log_lines": set(),
    "volumes": {"settings"},
    "data_lock": {"process_identity", "settings", "volumes"},
    "gate": {"contract", "log_lines", "tracing"},
    "connections": {"contract", "gate"},
    "metrics": set(),
    "tracing": {"sam3_runner"},
    "version": set(),
    "contract": set(PACKAGES),
    "pipeline": {"contract", "log_lines", "metrics", "settings", *PACKAGES},
    "recovery": {"contract", "log_lines", "pipeline", "tracing", *PACKAGES},
    "service": {
        *(
            "connections",
            "contract",
            "data_lock",
            "gate",
            "log_lines",
            "metrics",
            "pipeline",
            "process_identity",
            "recovery",
            "settings",
            "tracing",
            "version",
            "volumes",
        ),
        *PACKAGES,
    },
    "local_server": {"settings"},
    "download_weights": {"settings", "sam3_runner"},
    "given_up_tasks": {"process_identity", "results", "settings"},
}
"""Our modules that each part may import."""

VENDORS = {
    "torch": {"sam3_runner"},
    "transformers": {"sam3_runner"},
    "huggingface_hub": {"sam3_runner"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "sqlite3": {"results"},
    "fastapi": {"service"},
    "starlette": {"service", "metrics"},
    "bentoml": {"service", "metrics", "sam3_runner"},
    "opentelemetry": {"log_lines", "sam3_runner", "tracing"},
}
"""The only parts that may know each of these."""

TORCH_FREE = ("settings", "contract", "gate", "pipeline", "sam3_runner", "storage", "results", "service")


def part_of(path: Path) -> str:
    """The package or top module that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Top names of everything that a file imports, inside functions and for type checks too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.add(str(node.module).partition(".")[0])
    return names


def test_every_module_has_its_rule() -> None:
    """A new top module says what it may import."""
    assert set(ALLOWED) == {part_of(path) for path in SERVED}


@pytest.mark.parametrize("path", SERVED, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_directions(path: Path) -> None:
    """The packages know none of each other, nobody imports the service, vendors stay in their part."""
    part, imported = part_of(path), imports_of(path)
    assert imported & OURS <= ALLOWED[part]
    for vendor, parts in VENDORS.items():
        assert vendor not in imported or part in parts


@pytest.mark.parametrize("path", SERVED, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_is_read_in_one_place(path: Path) -> None:
    """Only settings.py reads the environment; local_server.py makes one for its child."""
    if path.name in {"settings.py", "local_server.py"}:
        return
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "getenv", "environb", "putenv"}


def test_api_workers_load_no_torch(tmp_path: Path) -> None:
    """Importing the service and all that API workers use leaves torch and transformers out."""
    code = (
        f"import sys, {', '.join(TORCH_FREE)}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={"SAM3_WEIGHTS_PATH": "demo", "BENTOML_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    ).stdout
    assert printed.splitlines()[-1] == "[]"


def test_predictor_is_at_the_front_door() -> None:
    """Python users find SAM3Predictor in the package, and an unknown name is an AttributeError."""
    import sam3_runner  # noqa: PLC0415 - torch comes with it
    from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415

    assert sam3_runner.SAM3Predictor is SAM3Predictor
    with pytest.raises(AttributeError):
        _ = sam3_runner.nothing
