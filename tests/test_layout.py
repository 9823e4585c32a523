"""Who may import whom: the directions that keep the parts apart."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import service

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parent.parent
PACKAGES = ("sam3_runner", "storage", "results")
"""What the server is made of; they know nothing of each other."""
FOLDERS = (
    *PACKAGES,
    "bentoml_patches",
    "commands",
    "contract",
    "observability",
    "outputs",
    "playground",
    "processes",
)
TOP_MODULES = {path.stem for path in ROOT.glob("*.py")}
CLIENT = "sam3_client"
"""A package of its own, with its own pyproject.toml; it runs without the server's code."""
ADAPTERS = "adapters"
"""Call a server; they run in the environments of the tools that they connect."""
BULK = "bulk"
"""Runs over many pictures without a server; it has requirements of its own."""
OURS = TOP_MODULES | set(FOLDERS) | {"training", "benchmarks", "examples", "tests", CLIENT, ADAPTERS, BULK}
SERVED = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])

ALLOWED = {
    **{package: {package} for package in PACKAGES},
    "version": set(),
    "setting_text": set(),
    "settings": {"sam3_runner", "setting_text"},
    "outputs": {"outputs", "sam3_runner"},
    "playground": {"playground"},
    "processes": {"processes", "settings"},
    "observability": {"sam3_runner"},
    "bentoml_patches": {"bentoml_patches", "processes"},
    "admission": {"observability"},
    "contract": {"contract", *PACKAGES},
    "gate": {"contract", "observability"},
    "connections": {"contract", "gate"},
    "stores": {"processes", "results", "settings", "storage", "version"},
    "segmentation": {"admission", "contract", "outputs", "sam3_runner"},
    "rendering": {"contract", "outputs", "sam3_runner", "segmentation"},
    "task_answer": {"contract", "rendering", *PACKAGES},
    "pipeline": {
        *("admission", "contract", "observability", "rendering", "segmentation", "settings", "task_answer"),
        *PACKAGES,
    },
    "overload": {"contract", "direct", "direct_form", "pipeline"},
    "direct": {
        *("admission", "contract", "observability", "outputs", "pipeline", "results", "sam3_runner"),
        *("segmentation", "task_answer"),
    },
    "direct_form": {"contract"},
    "recovery": {"contract", "observability", "pipeline", *PACKAGES},
    "startup": {
        "bentoml_patches",
        "contract",
        "observability",
        "processes",
        "settings",
        "stores",
        "version",
        *PACKAGES,
    },
    "service": {
        *(
            "bentoml_patches",
            "connections",
            "contract",
            "direct",
            "direct_form",
            "gate",
            "observability",
            "overload",
            "pipeline",
            "playground",
        ),
        *("processes", "recovery", "sam3_runner", "startup", "stores", "version"),
    },
    "commands": {"commands", "processes", "results", "sam3_runner", "settings", "storage", "stores"},
}
"""Our modules that each part may import."""

VENDORS = {
    "torch": {"sam3_runner"},
    "transformers": {"sam3_runner"},
    "huggingface_hub": {"sam3_runner"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "sqlite3": {"results"},
    "fastapi": {"service", "direct_form", "bentoml_patches"},
    "starlette": {"service", "gate", "direct_form", "playground", "bentoml_patches"},
    "uvicorn": {"connections", "bentoml_patches"},
    "bentoml": {"service", "bentoml_patches", "sam3_runner"},
    "_bentoml_impl": set(),
    "_bentoml_sdk": set(),
    "circus": {"bentoml_patches"},
    "opentelemetry": {"observability", "sam3_runner"},
    "ray": {BULK},
    "pyarrow": {BULK},
    "pandas": {BULK},
}
"""The only parts that may know each of these."""

COMES_WITH_TORCH = {"triton"}
"""With its builds for CUDA, in the version that they need. On a build for CPUs the code works without it."""

TORCH_FREE = (
    *("startup", "stores", "pipeline", "recovery", "sam3_runner", "storage", "results", "service"),
    *("outputs.coco", "outputs.polygons", "outputs.refinement"),
)


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


def modules_imported_by(path: Path) -> set[str]:
    """Whole names of all modules that a file imports from."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    from_imports = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return from_imports | {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }


@pytest.mark.parametrize("path", SERVED, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_patches_use_private_modules_of_bentoml(path: Path) -> None:
    """BentoML's private modules are imported by bentoml_patches alone."""
    private = {name for name in modules_imported_by(path) if name.startswith(("bentoml._", "_bentoml"))}
    assert not private or part_of(path) == "bentoml_patches"


def names_of(requirements: Iterable[object]) -> set[str]:
    """Names of the distributions that a list in pyproject.toml names."""
    texts = [each for each in requirements if isinstance(each, str)]
    return {re.split(r"[^a-z0-9_.-]", text.lower(), maxsplit=1)[0] for text in texts}


def test_every_direct_import_is_declared() -> None:
    """pyproject.toml names each distribution that our code imports, not only those that bring it along."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    served = names_of(declared["project"]["dependencies"])
    develop = served.union(*map(names_of, declared["dependency-groups"].values()))
    of_client = tomllib.loads((ROOT / CLIENT / "pyproject.toml").read_text())["project"]
    client = names_of(of_client["dependencies"]).union(
        *map(names_of, of_client["optional-dependencies"].values())
    )
    distributions = packages_distributions()
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    missing = set()
    for path in (ROOT / name for name in tracked.stdout.split()):
        allowed = served if path in SERVED else client if part_of(path) == CLIENT else develop
        tops = imports_of(path) - OURS - sys.stdlib_module_names - COMES_WITH_TORCH
        for top in (top for top in tops if not top.startswith("types_")):  # stubs, which only mypy reads
            names = {name.lower().replace("_", "-") for name in distributions.get(top, [])}
            if names and not names & {each.replace("_", "-") for each in allowed}:
                missing.add((str(path.relative_to(ROOT)), top))
    assert missing == set()


def test_every_logger_is_shown() -> None:
    """Each part that logs is among those whose lines the server shows, by its own name."""
    logging_parts = set()
    for path in SERVED:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "getLogger"
                and part_of(path) != "observability"
            ):
                logging_parts.add(part_of(path))
    assert logging_parts - {"commands"} == set(service.LOGGING_PARTS)


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


def test_outputs_know_only_the_values() -> None:
    """The forms of an answer are functions of `sam3_runner.instances`, and of nothing else of sam3_runner."""
    for path in (ROOT / "outputs").rglob("*.py"):
        modules = {name for name in modules_imported_by(path) if name.startswith("sam3_runner")}
        assert modules <= {"sam3_runner.instances"}, path


@pytest.mark.parametrize("path", SERVED, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_is_read_in_one_place(path: Path) -> None:
    """Only settings.py reads the environment; commands/local_server.py makes one for its child.

    A variable of a library may be set: `os.environ[...] = ...`.
    """
    if path.name in {"settings.py", "local_server.py"}:
        return
    nodes = list(ast.walk(ast.parse(path.read_text())))
    written = {
        node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    }
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node not in written}
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


def test_client_needs_none_of_the_server() -> None:
    """Importing the client loads nothing of the server, nor torch; its command line names our modules."""
    server = (OURS | VENDORS.keys() | {"torch"}) - {CLIENT}
    code = f"import sys, {CLIENT}; print(sorted({server} & sys.modules.keys()))"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert printed.strip() == "[]"
    for path in (ROOT / CLIENT).rglob("*.py"):
        assert imports_of(path) & OURS <= {CLIENT} or "command_line" in path.parts, path


@pytest.mark.parametrize("path", sorted((ROOT / ADAPTERS).rglob("*.py")), ids=str)
def test_adapters_call_a_server(path: Path) -> None:
    """An adapter knows the client and the forms of answers, with their values, and nothing else of ours."""
    assert imports_of(path) & OURS <= {ADAPTERS, CLIENT, "outputs", "sam3_runner"}
    modules = {name for name in modules_imported_by(path) if name.startswith("sam3_runner")}
    assert modules <= {"sam3_runner.instances"}


@pytest.mark.parametrize("path", sorted((ROOT / BULK).rglob("*.py")), ids=str)
def test_bulk_runs_know_the_model_and_the_outputs(path: Path) -> None:
    """A bulk run uses the predictor and the forms of answers, nothing of the server; one file knows boto3."""
    imported = imports_of(path)
    assert imported & OURS <= {BULK, "outputs", "sam3_runner", "version"}
    assert not imported & {"boto3", "botocore"} or path == ROOT / BULK / "objects" / "s3.py"
    assert not imported & (VENDORS.keys() - {"ray", "pyarrow", "pandas", "boto3", "botocore"})


def test_predictor_is_at_the_front_door() -> None:
    """Python users find SAM3Predictor in the package, and an unknown name is an AttributeError."""
    import sam3_runner  # noqa: PLC0415 - torch comes with it
    from sam3_runner.predictor import SAM3Predictor  # noqa: PLC0415

    assert sam3_runner.SAM3Predictor is SAM3Predictor
    with pytest.raises(AttributeError):
        _ = sam3_runner.nothing
