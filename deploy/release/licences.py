"""List the licences of the packages in a bill of materials, and check that they allow redistribution.

    python -m deploy.release.licences requirements.lock     # of the packages installed here

The check reads a package's metadata: an SPDX expression, or a classifier. It does not see files in a wheel
whose licence the metadata does not state.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from license_expression import ExpressionError, LicenseWithExceptionSymbol, get_spdx_licensing

from deploy.release import sbom
from deploy.release.refusals import NoRelease
from version import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_NVIDIA = "LicenseRef-NVIDIA-Proprietary"
ALLOWED = frozenset(
    {
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSD-3-Clause-Clear",
        "BSL-1.0",
        "CC0-1.0",
        "CNRI-Python",
        "ISC",
        "MIT",
        "MIT-0",
        "MIT-CMU",
        # Requires the source of its own files only, which the wheels contain.
        "MPL-2.0",
        "PSF-2.0",
        "Python-2.0",
        "Zlib",
        # NVIDIA's libraries for CUDA. The licence in each wheel allows redistribution in an application with
        # material additional functionality, under consistent terms (its sections on grant and distribution).
        _NVIDIA,
        # Classifiers that match several SPDX licences, which are allowed above.
        "License :: OSI Approved :: Apache Software License",
        "License :: OSI Approved :: BSD License",
        "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
    }
)
"""All other licences are refused, among them GPL and AGPL."""

_SPDX = get_spdx_licensing()
_NONE: frozenset[str] = frozenset()
_OTHER = frozenset({"License :: Other/Proprietary License"})


@dataclass(frozen=True, slots=True)
class Review:
    """A person's review of a package whose metadata is not sufficient.

    Attributes:
        stated: the licences in its metadata at the time; if they change, the review is void.
        licence: the licence that applies.
        source: where the licence is stated.
    """

    stated: frozenset[str]
    licence: str
    source: str


REVIEWS = {
    "transformers": Review(_NONE, "Apache-2.0", "its LICENSE; its licence field is free text"),
    "protobuf": Review(_NONE, "BSD-3-Clause", "its LICENSE; its licence field is free text"),
    "pycocotools": Review(_NONE, "BSD-2-Clause", "its licence field says FreeBSD; license.txt of cocoapi"),
    "simple-di": Review(_NONE, "Apache-2.0", "its LICENSE; its licence field is free text"),
    "cuda-toolkit": Review(_NONE, _NVIDIA, "contains no files, only depends on the packages below"),
    "nvidia-cusparselt-cu13": Review(_NONE, _NVIDIA, "its nvidia/cusparselt/LICENSE.txt"),
    "nvidia-nvtx": Review(_OTHER, "Apache-2.0", "its License.txt and its licence field"),
    **{
        f"nvidia-{library}": Review(_OTHER, _NVIDIA, "its License.txt and its licence field")
        for library in ("cuda-cupti", "cuda-nvrtc", "cufft", "cufile", "curand", "cusolver", "cusparse")
    },
}


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a bill of materials.

    Attributes:
        name: its name on PyPI.
        version: its version.
        stated: the licences in its metadata; all apply.
    """

    name: str
    version: str
    stated: frozenset[str]

    @property
    def licence(self) -> str:
        """The licence that applies: a review's, otherwise the package's."""
        review = REVIEWS.get(self.name)
        return review.licence if review and review.stated == self.stated else "; ".join(sorted(self.stated))


def packages_of(bill: Path) -> list[Package]:
    """Read the packages of a bill of materials (CycloneDX JSON), sorted by name."""
    packages = [
        Package(component["name"], component["version"], frozenset(_stated(component.get("licenses", []))))
        for component in json.loads(bill.read_text(encoding="utf-8"))["components"]
    ]
    return sorted(packages, key=lambda package: package.name.lower())


def _stated(licences: list[dict[str, Any]]) -> Iterator[str]:
    for licence in licences:
        named = licence.get("license", {})
        yield licence.get("expression") or named.get("id") or named["name"]


def refusals(packages: Iterable[Package]) -> list[str]:
    """List the packages that must not be redistributed, one sentence each."""
    return [
        f"{package.name} {package.version} states {package.licence or 'no licence'}, which is not allowed: "
        "choose another package, or add a review of its licence file to deploy/release/licences.py"
        for package in packages
        if not package.licence or not all(map(_is_allowed, package.licence.split("; ")))
    ]


def _is_allowed(licence: str) -> bool:
    """Whether a classifier or an SPDX expression is allowed: one side of each OR, both of each AND."""
    if licence in ALLOWED:
        return True
    try:
        return _holds(_SPDX.parse(licence, simple=True))
    except ExpressionError:
        return False


def _holds(expression: Any) -> bool:
    if isinstance(expression, _SPDX.AND):
        return all(map(_holds, expression.args))
    if isinstance(expression, _SPDX.OR):
        return any(map(_holds, expression.args))
    if isinstance(expression, LicenseWithExceptionSymbol):
        # An exception grants more rights than its licence.
        return _holds(expression.license_symbol)
    return str(expression.key) in ALLOWED


def write_list(packages: Iterable[Package], out: Path) -> None:
    """Write name, version and licence of each package as CSV."""
    with out.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("package", "version", "licence"))
        rows.writerows((package.name, package.version, package.licence) for package in packages)


def main() -> None:
    """Check the packages of the lock on the command line; exits with status 1 if one is refused."""
    lock = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        bill = Path(folder) / "sbom.cdx.json"
        try:
            sbom.of_installed(lock, Path.cwd(), VERSION, bill)
        except NoRelease as error:
            sys.exit(str(error))
        packages = packages_of(bill)
    refused = refusals(packages)
    if refused:
        sys.exit("\n".join(refused))
    print(f"{lock.name}: the licences of {len(packages)} packages are allowed")


if __name__ == "__main__":
    main()
