"""Rent, watch and return an instance on Vast.ai, with the `vastai` command line.

`make vastai` installs that into .venv/vastai, whose Python runs this script:

    .venv/vastai/bin/python deploy/vast/vast.py search h100
    .venv/vastai/bin/python deploy/vast/vast.py variables /etc/sam3/vast.env
    .venv/vastai/bin/python deploy/vast/vast.py template --image REGISTRY/sam3-vast@sha256:...
    .venv/vastai/bin/python deploy/vast/vast.py create OFFER --image ... --tunnel blue --template HASH
    .venv/vastai/bin/python deploy/vast/vast.py logs INSTANCE
    .venv/vastai/bin/python deploy/vast/vast.py destroy INSTANCE

Each `vastai` command is printed before it runs; none holds a secret. The key of the account comes from
VAST_API_KEY or from the file that `vastai` reads, ~/.config/vastai/vast_api_key.
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
    """The cheapest offers that can run the image."""
    query = " ".join([OFFERS["common"], OFFERS["cuda"][chosen.cuda], OFFERS["gpu"][chosen.gpu]])
    disk = TEMPLATE["recommended_disk_space"]
    return run("search", "offers", query, "--order", "dph", "--storage", disk, "--limit", "10")


def template(chosen: argparse.Namespace) -> int:
    """Make template.json, with this image, a template of the account; prints its hash."""
    return run(
        *("create", "template", "--name", TEMPLATE["name"], "--desc", TEMPLATE["desc"]),
        *("--image", chosen.image, "--env", TEMPLATE["env"]),
        *("--disk_space", TEMPLATE["recommended_disk_space"]),
        *("--search_params", f"{OFFERS['common']} {OFFERS['cuda'][chosen.cuda]}"),
    )


def create(chosen: argparse.Namespace) -> int:
    """Rent the offer. What is given here wins over the template."""
    common = (
        *("create", "instance", str(chosen.offer), "--image", chosen.image),
        # Left out, the command line sends 10 GB of its own, which would win over the template.
        *("--disk", TEMPLATE["recommended_disk_space"], "--label", f"sam3-{chosen.tunnel}"),
        # An error, instead of an instance that costs disk and waits for a GPU.
        "--cancel-unavail",
    )
    tunnel = f"-e CLOUDFLARE_TUNNEL={chosen.tunnel}"
    if chosen.template:
        return run(*common, "--env", tunnel, "--template_hash", chosen.template)
    return run(
        *common,
        *("--env", f"{TEMPLATE['env']} {tunnel}"),
        # SSH needs root; on-start gives the server the image's own user back.
        *("--ssh", "--direct", "--user", "root", "--onstart", str(KIT / "onstart.sh")),
    )


def show(chosen: argparse.Namespace) -> int:
    """State, image and price of the account's instances, or of one."""
    return run("show", "instance", str(chosen.instance)) if chosen.instance else run("show", "instances")


def logs(chosen: argparse.Namespace) -> int:
    """What the container wrote last."""
    return run("logs", str(chosen.instance), "--tail", str(chosen.tail))


def destroy(chosen: argparse.Namespace) -> int:
    """Return the instance with all that is on its disk; asks before it does."""
    return run("destroy", "instance", str(chosen.instance), *(["--yes"] if chosen.yes else []))


def variables(chosen: argparse.Namespace) -> int:
    """Copy NAME=value lines into the account's variables, which Vast.ai gives to each new container.

    By vastai's Python interface: its command line takes values as arguments only, where `ps` shows them.
    """
    values = read_variables(chosen.file)
    try:
        from vastai import VastAI  # noqa: PLC0415 - the other commands need its program alone
    except ModuleNotFoundError:
        sys.exit(NO_VASTAI)
    account = VastAI()
    known = account.show_env_vars()
    for name, value in values.items():
        change = account.update_env_var if name in known else account.create_env_var
        answer = change(name, value)
        if not answer.get("success"):
            sys.exit(f"Vast.ai did not take {name}: {answer.get('msg', 'it does not say why')}")
        say(f"{'updated' if name in known else 'created'} {name}")
    return 0


def read_variables(path: Path) -> dict[str, str]:
    """NAME=value lines. Ends the script with a sentence where the file is not fit for secrets."""
    if not path.is_file():
        sys.exit(f"{path} is not there: correct the path")
    if path.stat().st_mode & 0o077:
        sys.exit(f"{path} can be read by others: chmod 600 {path}")
    if path.resolve().is_relative_to(KIT.parent.parent.resolve()):
        sys.exit(f"{path} lies in the repository: keep secrets outside of it")
    values = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not value or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            sys.exit(f"line {number} of {path} is not NAME=value")
        values[name] = value
    return values


def run(*command: str) -> int:
    """Print and run a command of vastai; its exit status."""
    words = ["vastai", *command]
    say(f"+ {shlex.join(words)}")
    # The one that was installed beside this Python.
    program = str(Path(sys.executable).parent / words[0])
    try:
        return subprocess.run([program, *command], check=False).returncode
    except FileNotFoundError:
        sys.exit(NO_VASTAI)


def say(line: str) -> None:
    """To stderr, so that stdout is vastai's."""
    sys.stderr.write(line + "\n")


def image_by_digest(text: str) -> str:
    """REPOSITORY@sha256:..., since a tag can be moved."""
    if not re.fullmatch(r"[a-z0-9][a-zA-Z0-9._:/-]*@sha256:[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError("name the image by its digest: REGISTRY/sam3-vast@sha256:...")
    return text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: object, help_: str) -> argparse.ArgumentParser:
        added = commands.add_parser(str(getattr(function, "__name__", "")), help=help_, description=help_)
        added.set_defaults(run=function)
        return added

    def add_cuda(to: argparse.ArgumentParser) -> None:
        lines = sorted(OFFERS["cuda"])
        to.add_argument("--cuda", choices=lines, default="13", help="the image's CUDA line; default: 13")

    of_search = command(search, "list the cheapest offers that can run the image")
    of_search.add_argument("gpu", choices=sorted(OFFERS["gpu"]))
    add_cuda(of_search)
    of_variables = command(variables, "copy NAME=value lines into the account's variables")
    of_variables.add_argument("file", type=Path, help="outside of the repository, readable by you alone")
    of_template = command(template, "make template.json a template of the account")
    of_template.add_argument("--image", type=image_by_digest, required=True)
    add_cuda(of_template)
    of_create = command(create, "rent an offer")
    of_create.add_argument("offer", type=int, help="its id, as `search` lists it")
    of_create.add_argument("--image", type=image_by_digest, required=True)
    of_create.add_argument("--tunnel", choices=TUNNELS, required=True, help="which tunnel leads there")
    mode = of_create.add_mutually_exclusive_group(required=True)
    mode.add_argument("--template", help="the hash that `template` printed")
    mode.add_argument("--ssh", action="store_true", help="SSH mode, for a look inside, without a template")
    command(show, "list instances").add_argument("instance", type=int, nargs="?")
    of_logs = command(logs, "print what the container wrote last")
    of_logs.add_argument("instance", type=int)
    of_logs.add_argument("--tail", type=int, default=200, help="lines; default: 200")
    of_destroy = command(destroy, "return an instance, with all that is on its disk")
    of_destroy.add_argument("instance", type=int)
    of_destroy.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    sys.exit(arguments.run(arguments))
