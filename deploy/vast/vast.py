"""Rent, inspect and destroy an instance on Vast.ai, with the `vastai` command line.

`make vastai` installs `vastai` into .venv/vastai; run this script with the Python there:

    .venv/vastai/bin/python deploy/vast/vast.py search h100
    .venv/vastai/bin/python deploy/vast/vast.py variables /etc/sam3/vast.env
    .venv/vastai/bin/python deploy/vast/vast.py template --image REGISTRY/sam3-vast@sha256:...
    .venv/vastai/bin/python deploy/vast/vast.py create OFFER --image ... --tunnel blue --template HASH
    .venv/vastai/bin/python deploy/vast/vast.py logs INSTANCE
    .venv/vastai/bin/python deploy/vast/vast.py destroy INSTANCE

Each `vastai` command is printed before it runs; none contains a secret. The account's key comes from
VAST_API_KEY or from vastai's own file, ~/.config/vastai/vast_api_key.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

KIT = Path(__file__).parent
TEMPLATE = json.loads((KIT / "template.json").read_text())
OFFERS = json.loads((KIT / "offers.json").read_text())
TUNNELS = ("blue", "green")
NO_VASTAI = "vastai is not installed for this Python: `make vastai`, then use .venv/vastai/bin/python"


def search(chosen: argparse.Namespace) -> int:
    """List the cheapest offers that can run the image."""
    query = " ".join([OFFERS["common"], OFFERS["cuda"][chosen.cuda], OFFERS["gpu"][chosen.gpu]])
    disk = TEMPLATE["recommended_disk_space"]
    return run("search", "offers", query, "--order", "dph", "--storage", disk, "--limit", "10")


def template(chosen: argparse.Namespace) -> int:
    """Create the account's template from template.json with this image; prints its hash."""
    return run(
        *("create", "template", "--name", TEMPLATE["name"], "--desc", TEMPLATE["desc"]),
        *("--image", chosen.image, "--env", TEMPLATE["env"]),
        *("--disk_space", TEMPLATE["recommended_disk_space"]),
        *("--search_params", f"{OFFERS['common']} {OFFERS['cuda'][chosen.cuda]}"),
    )


def create(chosen: argparse.Namespace) -> int:
    """Rent the offer. These options override the template."""
    common = (
        *("create", "instance", str(chosen.offer), "--image", chosen.image),
        # Without it vastai sends its default of 10 GB, which overrides the template.
        *("--disk", TEMPLATE["recommended_disk_space"], "--label", f"sam3-{chosen.tunnel}"),
        # Fail, instead of renting a stopped instance that waits for a GPU.
        "--cancel-unavail",
    )
    tunnel = f"-e CLOUDFLARE_TUNNEL={chosen.tunnel}"
    if chosen.template:
        return run(*common, "--env", tunnel, "--template_hash", chosen.template)
    return run(
        *common,
        *("--env", f"{TEMPLATE['env']} {tunnel}"),
        # SSH needs root; the on-start script starts the server as the image's own user.
        *("--ssh", "--direct", "--user", "root", "--onstart", str(KIT / "onstart.sh")),
    )


def show(chosen: argparse.Namespace) -> int:
    """Show state, image and price of one or all instances of the account."""
    return run("show", "instance", str(chosen.instance)) if chosen.instance else run("show", "instances")


def logs(chosen: argparse.Namespace) -> int:
    """Print the last lines of the container's log."""
    return run("logs", str(chosen.instance), "--tail", str(chosen.tail))


def destroy(chosen: argparse.Namespace) -> int:
    """Destroy the instance and its disk; asks for confirmation."""
    return run("destroy", "instance", str(chosen.instance), *(["--yes"] if chosen.yes else []))


def variables(chosen: argparse.Namespace) -> int:
    """Copy NAME=value lines to the account's variables, which Vast.ai passes to each new container.

    Uses vastai's Python interface: its command line takes values as arguments, which `ps` shows.
    """
    values = read_variables(chosen.file)
    try:
        from vastai import VastAI  # noqa: PLC0415 - the other commands need only its program
    except ModuleNotFoundError:
        sys.exit(NO_VASTAI)
    account = VastAI()
    known = account.show_env_vars()
    for name, value in values.items():
        change = account.update_env_var if name in known else account.create_env_var
        answer = change(name, value)
        if not answer.get("success"):
            sys.exit(f"Vast.ai refused {name}: {answer.get('msg', 'without a reason')}")
        report(f"{'updated' if name in known else 'created'} {name}")
    return 0


def read_variables(path: Path) -> dict[str, str]:
    """Read NAME=value lines. Exits with an error message if the file is not safe for secrets."""
    if not path.is_file():
        sys.exit(f"{path} does not exist: correct the path")
    if path.stat().st_mode & 0o077:
        sys.exit(f"{path} can be read by others: chmod 600 {path}")
    if path.resolve().is_relative_to(KIT.parent.parent.resolve()):
        sys.exit(f"{path} is in the repository: keep secrets outside of it")
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not value or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            sys.exit(f"line {number} of {path} is not NAME=value")
        if re.search(r"(^|\s)#", value) or value[0] in "'\"":
            sys.exit(f"line {number} of {path} has a comment or quotes, which would be sent too: remove them")
        values[name] = value
    return values


def run(*command: str) -> int:
    """Print and run a vastai command; returns its exit status."""
    words = ["vastai", *command]
    report(f"+ {shlex.join(words)}")
    # The one in the same environment as this Python.
    program = str(Path(sys.executable).parent / words[0])
    try:
        return subprocess.run([program, *command], check=False).returncode
    except FileNotFoundError:
        sys.exit(NO_VASTAI)


def report(line: str) -> None:
    """Print to stderr; stdout is for vastai."""
    sys.stderr.write(line + "\n")


def image_by_digest(text: str) -> str:
    """Check for REPOSITORY@sha256:..., because a tag can change."""
    if not re.fullmatch(r"[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError("name the image by its digest: REGISTRY/sam3-vast@sha256:...")
    return text


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: object, help_: str) -> argparse.ArgumentParser:
        added = commands.add_parser(str(getattr(function, "__name__", "")), help=help_, description=help_)
        added.set_defaults(run=function)
        return added

    def add_cuda(to: argparse.ArgumentParser) -> None:
        versions = sorted(OFFERS["cuda"])
        to.add_argument(
            "--cuda", choices=versions, default="13", help="the image's CUDA version; default: 13"
        )

    of_search = command(search, "list the cheapest offers that can run the image")
    of_search.add_argument("gpu", choices=sorted(OFFERS["gpu"]))
    add_cuda(of_search)
    of_variables = command(variables, "copy NAME=value lines to the account's variables")
    of_variables.add_argument("file", type=Path, help="outside of the repository, readable only by you")
    of_template = command(template, "create the account's template from template.json")
    of_template.add_argument("--image", type=image_by_digest, required=True)
    add_cuda(of_template)
    of_create = command(create, "rent an offer")
    of_create.add_argument("offer", type=int, help="its id, as `search` lists it")
    of_create.add_argument("--image", type=image_by_digest, required=True)
    of_create.add_argument("--tunnel", choices=TUNNELS, required=True, help="the tunnel to the instance")
    mode = of_create.add_mutually_exclusive_group(required=True)
    mode.add_argument("--template", help="the hash that `template` printed")
    mode.add_argument("--ssh", action="store_true", help="SSH mode, for debugging, without a template")
    command(show, "list instances").add_argument("instance", type=int, nargs="?")
    of_logs = command(logs, "print the last lines of the container's log")
    of_logs.add_argument("instance", type=int)
    of_logs.add_argument("--tail", type=int, default=200, help="lines; default: 200")
    of_destroy = command(destroy, "destroy an instance and its disk")
    of_destroy.add_argument("instance", type=int)
    of_destroy.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    sys.exit(arguments.run(arguments))
