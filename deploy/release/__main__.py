"""Make a release: run all tests, build the images and the Bento, list their packages. Pushes nothing.

    make release VERSION=1.2.3                   # everything, to dist/1.2.3/
    make release VERSION=1.2.3 VARIANTS=cpu      # one variant of the image; make image's variables work too
    make release VERSION=1.2.3 CHECK_ONLY=1      # only checks whether it can be released
    make release VERSION=1.2.3 SKIP=tests        # a rehearsal; also SKIP=audit, SKIP="tests audit"

It uses the repository in the current folder and its Makefile.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.image.build import find_tool
from deploy.image.variants import PYTHON_VERSIONS
from deploy.release import licences, sbom
from deploy.release.refusals import NoRelease, head, refusals, tag_of

CHECKSUMS = "SHA256SUMS"
_OPTIONAL_STEPS = ("tests", "audit")
"""Steps that a rehearsal may skip."""


def main() -> None:
    """Make the release that the command line names. Exits with a message and status 1 if it cannot."""
    options = _options()
    root = Path.cwd()
    _refuse(root, options.version)
    commit = head(root)
    if options.check_only:
        print(f"{options.version} can be released from {commit}")
        return
    folder = root / "dist" / options.version
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _run_tests(options.skip)
        for variant in options.variants:
            make_image(root, options.version, variant, folder)
        export_bento(root, options.version, folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"no release: {' '.join(map(str, error.cmd[:5]))} ended with status {error.returncode}")
    except NoRelease as error:
        sys.exit(f"no release: {error}")
    _refuse(root, options.version)
    if head(root) != commit:
        sys.exit(f"no release: {commit} was tested, but {head(root)} is checked out now: start again")
    write_checksums(folder)
    print(_next_commands(options, commit))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make release", description="Make a release; push nothing.")
    parser.add_argument("version", help="as in 1.2.3")
    parser.add_argument("--variants", nargs="+", default=["cu130", "cpu"], help="of the image")
    parser.add_argument("--image", default="ghcr.io/OWNER/sam3", help="where the image will be pushed to")
    parser.add_argument("--skip", nargs="+", choices=_OPTIONAL_STEPS, default=[], help="for a rehearsal")
    parser.add_argument("--check-only", action="store_true", help="build nothing")
    return parser.parse_args()


def _refuse(root: Path, version: str) -> None:
    found = refusals(root, version)
    if found:
        sys.exit("\n".join(f"no release: {sentence}" for sentence in found))


def _run_tests(skip: list[str]) -> None:
    """Run every tier; a tier that cannot run here fails."""
    if "tests" not in skip:
        _make("check", "test", REQUIRE_ALL_TIERS="1")
    if "audit" not in skip:
        _make("audit")


def _make(*targets: str, **variables: str) -> None:
    subprocess.run(
        ["make", *targets, *(f"{name}={value}" for name, value in variables.items())],
        env=os.environ | variables,
        check=True,
    )


def make_image(root: Path, version: str, variant: str, folder: Path) -> None:
    """Build one variant of the image; write its archive, its bill of materials and its licences.

    Raises:
        CalledProcessError: make or the container tool failed.
        NoRelease: the build has no wheels, or a package must not be redistributed.
    """
    tag = f"localhost/sam3:{version}-{variant}"
    _make("image", VARIANT=variant, TAG=tag)
    name = f"sam3-{version}-{variant}"
    bill = folder / f"{name}.cdx.json"
    context = (
        root / "build" / "image" / f"{variant}-py{os.environ.get('PYTHON_VERSION') or PYTHON_VERSIONS[0]}"
    )
    sbom.of_wheels(context / "wheels", context / "requirements.txt", root, version, bill)
    packages = licences.packages_of(bill)
    refused = licences.refusals(packages)
    if refused:
        raise NoRelease("; ".join(refused))
    licences.write_list(packages, folder / f"{name}-licences.csv")
    subprocess.run([find_tool(), "save", "--output", str(folder / f"{name}.tar"), tag], check=True)


def export_bento(root: Path, version: str, folder: Path) -> None:
    """Export the images' Bento to one file."""
    store = root / "build" / "image" / "bentoml"
    subprocess.run(
        [sys.executable, "-m", "bentoml", "export", "sam3:latest", str(folder / f"sam3-{version}.bento")],
        env=os.environ | {"BENTOML_HOME": str(store), "BENTOML_DO_NOT_TRACK": "True"},
        check=True,
    )


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder, in the format of `sha256sum --check`."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def _next_commands(options: argparse.Namespace, commit: str) -> str:
    version, folder, tag = options.version, f"dist/{options.version}", tag_of(options.version)
    if options.skip:
        return f"{folder}/ is a rehearsal, not for publishing: {' and '.join(options.skip)} were skipped"
    commands = [
        f"{folder}/ is complete, nothing was pushed. Next:",
        "",
        f"  git tag --annotate {tag} --message 'Release {version}' {commit}",
        f"  git push origin {tag}    # .github/workflows/release.yaml builds, pushes and signs it",
        "",
        "Or push and sign these files, and verify the image before each deployment:",
        "",
    ]
    for variant in options.variants:
        name, digest = f"{folder}/sam3-{version}-{variant}", f"{folder}/{variant}.digest"
        pushed = f"{options.image}@$(cat {digest})"
        address = f"docker://{options.image}:{version}-{variant}"
        signer = (
            "--certificate-identity YOUR_ADDRESS --certificate-oidc-issuer https://github.com/login/oauth"
        )
        commands += [
            f"  skopeo copy --digestfile {digest} docker-archive:{name}.tar {address}",
            f"  cosign sign --yes {pushed}",
            f"  cosign attest --yes --type cyclonedx --predicate {name}.cdx.json {pushed}",
            f"  cosign verify {signer} {pushed}",
        ]
    return "\n".join(commands)


if __name__ == "__main__":
    main()
