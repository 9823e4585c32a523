"""The commands of `sam3` and their options."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from sam3_client.calls import Options
from sam3_client.command_line.bulk import BULK_HELP, bulk
from sam3_client.command_line.errors import CommandError, exit_codes
from sam3_client.command_line.formats import FORMATS
from sam3_client.command_line.out_folder import OutFolder
from sam3_client.command_line.pictures import find_pictures
from sam3_client.command_line.predict import Run, predict
from sam3_client.command_line.segmenters import LocalSegmenter, ServerSegmenter
from sam3_client.command_line.server_code import server_code
from sam3_client.command_line.summary import show_checks, show_summary
from sam3_client.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from sam3_client.command_line.segmenters import Segmenter

DEFAULT_PORT = 3000
DEFAULT_FORMATS = "overlay,coco"
PREDICT_HELP = """Find what prompts name in pictures, on a server or in this process.

SOURCES are folders, files, and patterns in quotes. The same command again goes on where it stopped.

Exit codes: 0 all pictures are done, 1 some failed, 2 wrong usage, 3 the server or its key, 130 Ctrl-C.
"""

app = typer.Typer(
    name="sam3",
    help="Find everything that a text names in pictures: predict on a server, or serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _PromptsCommand(TyperCommand):
    """Takes several values after one --prompts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, "--prompts"))


def spread(arguments: list[str], option: str) -> list[str]:
    """Repeat `option` before each of its values, which end at the next option."""
    found: list[str] = []
    takes = False
    for argument in arguments:
        if argument == option or argument.startswith("-"):
            takes = argument == option
            if not takes:
                found.append(argument)
        else:
            found += [option, argument] if takes else [argument]
    return found


def _version(value: bool) -> None:  # noqa: FBT001 - typer's own form
    if value:
        typer.echo(f"sam3 {VERSION}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("bulk", cls=_PromptsCommand, help=BULK_HELP, no_args_is_help=True)(bulk)


@app.command("predict", cls=_PromptsCommand, help=PREDICT_HELP, no_args_is_help=True)
def _predict(
    out: Annotated[Path, typer.Option(help="Folder for what is written.")],
    sources: Annotated[
        list[str] | None, typer.Argument(help="Folders, pictures, patterns in quotes.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", help="What to find: one or several noun phrases, after the sources."),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"Of {', '.join(FORMATS)}; several with commas. Default: {DEFAULT_FORMATS}.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(envvar="SAM3_URL", help="The server. Default: http://127.0.0.1:3000."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            envvar="SAM3_API_KEY", help="Its key; better in the variable, since others can see options."
        ),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run the model in this process: needs the server's code.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            envvar="SAM3_WEIGHTS_PATH",
            help="With --local: a file, a folder, or demo. Default: weights/sam3.pt if it exists, else demo.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="x0,y0,x1,y1 in px: find more like what is in it. May be repeated."),
    ] = None,
    negative_box: Annotated[
        list[str] | None, typer.Option(help="As --box: leave out what is like it.")
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep instances with a higher score. Default: 0.5.")
    ] = None,
    fill_holes: Annotated[
        int | None, typer.Option(min=0, help="Fill holes of at most so many px in a mask.")
    ] = None,
    remove_islands: Annotated[
        int | None, typer.Option(min=0, help="Remove parts of at most so many px from a mask.")
    ] = None,
    min_area: Annotated[int | None, typer.Option(min=0, help="Leave out instances of fewer px.")] = None,
    nms_iou: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of two instances of a prompt that overlap more, keep the better."),
    ] = None,
    max_instances: Annotated[
        int | None, typer.Option(min=1, help="Of each prompt, keep so many of the best.")
    ] = None,
    tiles: Annotated[
        str | None, typer.Option(help="For small things: a grid of so many tiles a side, or auto.")
    ] = None,
    deadline_ms: Annotated[
        int | None, typer.Option(min=1, help="How long the server may let a request wait.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Pictures at a time.")] = 4,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a server that is busy, loading or away.")
    ] = 60.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what an earlier run wrote into --out, and begin anew.")
    ] = False,
) -> None:
    with exit_codes():
        asked = list(prompts or ())
        if not sources:
            raise CommandError("name the pictures first: sam3 predict FOLDER --prompts car --out FOUND")
        boxes = [*map(_box, box or ()), *map(_box, negative_box or ())]
        if not asked and not boxes:
            raise CommandError("there is nothing to find: give --prompts, or --box")
        options = Options(
            boxes=boxes or None,
            box_labels=[1] * len(box or ()) + [0] * len(negative_box or ()) if boxes else None,
            score_threshold=score_threshold,
            fill_holes=fill_holes,
            remove_islands=remove_islands,
            min_area=min_area,
            nms_iou=nms_iou,
            max_instances=max_instances,
            tiles=_tiles(tiles),
            deadline_ms=deadline_ms,
        )
        found = find_pictures(sources, out)
        run = Run(found, OutFolder(out), asked, _formats(formats), jobs)
        settings = {
            "root": str(found.root),
            "prompts": asked,
            "formats": sorted(run.formats),
            **{name: value for name, value in options.given().items() if name != "deadline_ms"},
        }

        def make_segmenter() -> Segmenter:
            if local:
                return LocalSegmenter(weights, asked, options)
            return ServerSegmenter(url, key, max_wait, asked, options)

        _run(run, settings, make_segmenter, overwrite=overwrite)


def _run(
    run: Run, settings: dict[str, Any], make_segmenter: Callable[[], Segmenter], *, overwrite: bool
) -> None:
    with run.out.opened(settings, overwrite=overwrite):
        summary = predict(run, make_segmenter)
    if summary.done + summary.kept + len(summary.failed) > 0:
        show_summary(summary, run)
    if summary.stopped:
        sys.stderr.write(f"sam3: {summary.stopped}\n")
        if summary.done + summary.kept:
            sys.stderr.write("sam3: what is done is kept; the same command goes on where this one stopped\n")
    raise typer.Exit(summary.exit_code)


def _formats(given: list[str] | None) -> list[str]:
    names = [name.strip() for text in given or [DEFAULT_FORMATS] for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise CommandError(f"--format knows {', '.join(FORMATS)}, not {name}")
    return list(dict.fromkeys(names))


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = (float(side) for side in text.split(","))
    except ValueError:
        raise CommandError(f"a box is x0,y0,x1,y1 in px, as in 10,20,110,90, not {text}") from None
    return x0, y0, x1, y1


def _tiles(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise CommandError(f"--tiles is a whole number or auto, not {text}")
    return int(text)


@app.command(help="Run a server on this machine: the embedded demo, or the weights that the settings name.")
def serve(
    port: Annotated[int, typer.Option(help="Of 127.0.0.1.")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Become the server, in the checkout's folder, which has its `.env` and its `data`."""
    with exit_codes(), server_code("sam3 serve") as checkout:
        os.chdir(checkout)
        from commands.local_server import server_command  # noqa: PLC0415 - the server's code
        from settings import choose_demo_by_default  # noqa: PLC0415

        choose_demo_by_default()
        command = [*server_command(port), "--host", host]
        environment = os.environ | {"BENTOML_DO_NOT_TRACK": "True"}
        sys.stdout.flush()
        if os.name == "posix":
            os.execve(command[0], command, environment)  # noqa: S606 - signals then reach the server
        raise typer.Exit(subprocess.call(command, env=environment))  # noqa: S603 - our own command


OTHER_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Of a command whose options its own program reads."""


@app.command(
    help="Show it once: serve a sample picture with the embedded demo, and draw what was found.",
    context_settings=OTHER_OPTIONS,
)
def demo(context: typer.Context) -> None:
    """Run examples/demo.py with the given options."""
    with exit_codes(), server_code("sam3 demo"):
        from examples.demo import main as run_demo  # noqa: PLC0415 - the server's code

        sys.argv = ["sam3 demo", *context.args]
        raise typer.Exit(run_demo())


@app.command(help="Download the gated weights to SAM3_WEIGHTS_PATH; needs HF_TOKEN.")
def weights() -> None:
    """Run commands/download_weights.py in the checkout's folder."""
    with exit_codes(), server_code("sam3 weights") as checkout:
        os.chdir(checkout)
        from commands.download_weights import main as download  # noqa: PLC0415 - the server's code

        download()


@app.command(
    help="Measure the latency of lone requests on this machine, with the embedded demo.",
    context_settings=OTHER_OPTIONS,
)
def benchmark(context: typer.Context) -> None:
    """Run benchmarks/latency.py with the given options."""
    with exit_codes(), server_code("sam3 benchmark", "pip install -r requirements-dev.lock"):
        from benchmarks.latency import main as measure  # noqa: PLC0415 - the server's code

        sys.argv = ["sam3 benchmark", *context.args]
        raise typer.Exit(measure())


@app.command(help="Check this machine and the server's settings, and say how to mend what is wrong.")
def doctor(
    port: Annotated[int, typer.Option(help="That the server is to listen on.")] = DEFAULT_PORT,
) -> None:
    """Print a table of checks; the exit code is 1 if one has failed."""
    with exit_codes(), server_code("sam3 doctor") as checkout:
        os.chdir(checkout)
        from commands.doctor import all_checks  # noqa: PLC0415 - the server's code

        with suppress(ImportError):  # it is reported as a check
            from settings import choose_demo_by_default  # noqa: PLC0415

            choose_demo_by_default()
        logging.disable()  # stores log what the table says
        checks = list(all_checks(port))
        show_checks(checks)
        raise typer.Exit(int(any(check.status == "failed" for check in checks)))
