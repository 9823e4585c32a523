"""The options of `sam3 bulk`, which runs the server's package `bulk`."""

from __future__ import annotations

from typing import Annotated

import typer

from sam3_client.command_line.errors import exit_codes
from sam3_client.command_line.server_code import server_code

BULK_HELP = """Find what prompts name in every picture of a bucket, a folder or a list, on Ray.

A picture's masks and its row are written once. The same command again goes on where it stopped.

S3 buckets are read and written with the credentials that the AWS command line uses: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a profile or a role. For R2 and others set AWS_ENDPOINT_URL too.

Exit codes: 0 all pictures are done, 1 some are error rows, 2 wrong usage, 3 a store, its credentials or Ray,
130 Ctrl-C.
"""


def bulk(
    images: Annotated[
        str,
        typer.Option(help="s3://bucket/prefix, a folder, or a .csv or .parquet file with a column image."),
    ],
    prompts: Annotated[
        list[str], typer.Option("--prompts", help="What to find: one or several noun phrases.")
    ],
    out: Annotated[str, typer.Option(help="s3://bucket/prefix or a folder, for the folders of runs.")],
    weights: Annotated[
        str | None,
        typer.Option(
            envvar="SAM3_WEIGHTS_PATH",
            help="A file, a folder, or demo. Default: weights/sam3.pt if it exists, else demo.",
        ),
    ] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Keep instances with a higher score. Default: 0.5.")
    ] = None,
    fill_holes: Annotated[int, typer.Option(min=0, help="Fill holes of at most so many px in a mask.")] = 0,
    remove_islands: Annotated[
        int, typer.Option(min=0, help="Remove parts of at most so many px from a mask.")
    ] = 0,
    min_area: Annotated[int, typer.Option(min=0, help="Leave out instances of fewer px.")] = 0,
    nms_iou: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Of two instances that overlap more, keep the better, over all prompts."
        ),
    ] = None,
    max_instances: Annotated[
        int | None, typer.Option(min=1, help="Of each prompt, keep so many of the best.")
    ] = None,
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Write a PNG a picture and prompt, beside the rows.")
    ] = True,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, such as auto. Default: a Ray on this machine alone."),
    ] = None,
    background: Annotated[
        bool,
        typer.Option(
            "--background", help="Leave the machine to others, such as a server, where they need it."
        ),
    ] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics on this port of 127.0.0.1.")
    ] = None,
    shard_pictures: Annotated[
        int,
        typer.Option(min=1, help="Pictures that are written together. A kill costs a few times as many."),
    ] = 64,
    max_wait: Annotated[
        float, typer.Option(min=1, help="Seconds to retry a store that is away or busy, then the run ends.")
    ] = 300.0,
) -> None:
    """Run it, and exit with its code."""
    install = "pip install -r requirements-bulk.lock"
    with exit_codes(), server_code("sam3 bulk", install):
        from bulk.command import Arguments, run_command  # noqa: PLC0415 - the server's code
        from outputs.refinement import Refinement  # noqa: PLC0415 - the server's code

        arguments = Arguments(
            images,
            tuple(prompts),
            out,
            weights=weights,
            score_threshold=score_threshold,
            refinement=Refinement(nms_iou, max_instances, min_area, fill_holes, remove_islands),
            write_masks=masks,
            ray_address=ray_address,
            metrics_port=metrics_port,
            shard_pictures=shard_pictures,
            max_wait_s=max_wait,
            background=background,
        )
        raise typer.Exit(run_command(arguments))
