"""The licences of the packages in a bill of materials: listed, and held to those that may be passed on.

    python -m deploy.release.licences requirements.lock     # of the packages installed here

A package is judged by what it states itself: an SPDX expression, or a classifier. What lies in a wheel and is
stated nowhere is not seen.
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
        # Asks for the source of its own files alone, which the wheels are.
        "MPL-2.0",
        "PSF-2.0",
        "Python-2.0",
        "Zlib",
        # NVIDIA's libraries for CUDA. The licence in each wheel allows to pass them on in an application that
        # adds much to them, under terms that agree with it (its sections on grant and on distribution).
        _NVIDIA,
        # Classifiers that name no one SPDX licence; what they commonly mean is above.
        "License :: OSI Approved :: Apache Software License",
        "License :: OSI Approved :: BSD License",
        "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
    }
)
"""Everything else is refused, GPL and AGPL among it."""

_SPDX = get_spdx_licensing()
_NOTHING: frozenset[str] = frozenset()
_OTHER = frozenset({"License :: Other/Proprietary License"})


@dataclass(frozen=True, slots=True)
class Review:
    """What a person found about a package whose own words say too little.

    Attributes:
        stated: its words at the time; with others the review does not count.
        licence: what applies.
        source: where that is written.
    """

    stated: frozenset[str]
    licence: str
    source: str


REVIEWS = {
    "transformers": Review(_NOTHING, "Apache-2.0", "its LICENSE; its licence field is free text"),
    "protobuf": Review(_NOTHING, "BSD-3-Clause", "its LICENSE; its licence field is free text"),
    "simple-di": Review(_NOTHING, "Apache-2.0", "its LICENSE; its licence field is free text"),
    "cuda-toolkit": Review(_NOTHING, _NVIDIA, "holds no file, only asks for the packages below"),
    "nvidia-cusparselt-cu13": Review(_NOTHING, _NVIDIA, "its nvidia/cusparselt/LICENSE.txt"),
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
        name: as on PyPI.
        version: of the package.
        stated: its licences in its own words; all apply.
    """

    name: str
    version: str
    stated: frozenset[str]

    @property
    def licence(self) -> str:
        """What applies: a review's word, else its own."""
        review = REVIEWS.get(self.name)
        return review.licence if review and review.stated == self.stated else "; ".join(sorted(self.stated))


def packages_of(bill: Path) -> list[Package]:
    """The packages of a bill of materials (CycloneDX JSON), by name."""
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
    """Which packages may not be passed on, in a sentence each."""
    return [
        f"{package.name} {package.version} states {package.licence or 'no licence'}, which is not allowed: "
        "choose another package, or note in deploy/release/licences.py what its licence file says"
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
        # An exception permits more than its licence.
        return _holds(expression.license_symbol)
    return str(expression.key) in ALLOWED


def write_list(packages: Iterable[Package], out: Path) -> None:
    """Write name, version and licence of each package as CSV."""
    with out.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("package", "version", "licence"))
        rows.writerows((package.name, package.version, package.licence) for package in packages)


def main() -> None:
    """Judge the packages of the lock on the command line; with a refusal, status 1."""
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
