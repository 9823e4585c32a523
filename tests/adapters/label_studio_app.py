"""Tries the backend in the real Label Studio, by its API and by its page in Chromium, and keeps pictures.

    python3 -m venv ../label-studio && ../label-studio/bin/pip install label-studio==1.23.2
    .venv/bin/python -m tests.adapters.label_studio_app --label-studio ../label-studio/bin/label-studio

Not part of `make test`: Label Studio is 800 MB and takes up to a minute to start.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from commands.local_server import local_server, reserved_ports, stop, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "examples" / "sample.jpg"
SQUARE = (0, 484, 224, 708)
"""x0, y0, x1, y1 of the red square on the sample picture, px."""
TIMEOUT_MS = 60_000
EMAIL = "annotator@example.com"
CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image" smart="false">
    <Label value="Disc" alias="purple circle" background="#ffd33d"/>
  </BrushLabels>
  <PolygonLabels name="polygon" toName="image" smart="false">
    <Label value="Triangle" prompt="triangles" background="#0a58ca"/>
    <Label value="Square" prompt="" background="#111111"/>
  </PolygonLabels>
  <RectangleLabels name="example" toName="image" smart="true" smartOnly="true">
    <Label value="Square" background="#111111"/>
  </RectangleLabels>
</View>
"""
"""That of docs/adapters/label-studio.md."""


def main() -> None:
    """Run all steps; an AssertionError says what was not as it should be."""
    arguments = _parser().parse_args()
    password, token = secrets.token_urlsafe(12), secrets.token_hex(20)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        studio_port, backend_port = stack.enter_context(reserved_ports(2))
        studio, backend = f"http://127.0.0.1:{studio_port}", f"http://127.0.0.1:{backend_port}"
        server = stack.enter_context(local_server(folder / "sam3", {"DIRECT_API": "true"}))
        account = ["--username", EMAIL, "--password", password, "--user-token", token]
        stack.enter_context(
            _process(
                [
                    *(arguments.label_studio, "start", "--no-browser", "--internal-host", "127.0.0.1"),
                    *("--port", str(studio_port), *account),
                ],
                {
                    "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "studio"),
                    "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
                    "ML_BLOCK_LOCAL_IP": "false",
                    "COLLECT_ANALYTICS": "false",
                },
                folder / "studio.log",
                studio,
            )
        )
        stack.enter_context(
            _process(
                [arguments.backend_python, "-m", "adapters.label_studio", "--port", str(backend_port)],
                {
                    "LABEL_STUDIO_URL": studio,
                    "LABEL_STUDIO_API_KEY": token,
                    "SAM3_URL": server.url,
                    "SAM3_API_KEY": server.api_key,
                },
                folder / "backend.log",
                backend,
            )
        )
        api = stack.enter_context(
            httpx.Client(base_url=studio, headers={"Authorization": f"Token {token}"}, timeout=120)
        )
        _predictions(api, backend)
        _refusal(api)
        _page(studio, password, arguments.out)
        _export(api)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tries the backend in the real Label Studio.")
    parser.add_argument("--label-studio", required=True, help="its command, in an environment of its own")
    parser.add_argument("--backend-python", default=".venv/annotation/bin/python")
    parser.add_argument("--out", type=Path, default=Path("docs/adapters"), help="folder of the pictures")
    return parser


@contextmanager
def _process(command: list[str], environment: dict[str, str], log_path: Path, url: str) -> Iterator[None]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until_ready(process, url, log_path, 300.0, path="/health")
            yield
        finally:
            stop(process)


def _predictions(api: httpx.Client, backend: str) -> None:
    """A project, a task, the backend; then the predictions, as the button "Retrieve predictions" asks."""
    api.post("/api/projects", json={"title": "Shapes", "label_config": CONFIG}).raise_for_status()
    with SAMPLE.open("rb") as file:
        api.post("/api/projects/1/import", files={"file": ("sample.jpg", file)}).raise_for_status()
    connected = api.post(
        "/api/ml", json={"project": 1, "url": backend, "title": "SAM 3", "is_interactive": True}
    )
    # 1.23.2 stores a backend with a private address, and then refuses the same address for a webhook.
    print(f"connecting the backend: {connected.status_code} {connected.text[:200]}")  # noqa: T201
    [state] = api.get("/api/ml", params={"project": 1}).raise_for_status().json()
    assert state["url"] == backend
    retrieved = api.post(
        "/api/dm/actions",
        params={"id": "retrieve_tasks_predictions", "project": 1},
        json={"selectedItems": {"all": True, "excluded": []}},
    )
    retrieved.raise_for_status()
    [prediction] = api.get("/api/predictions", params={"project": 1}).raise_for_status().json()
    print(f"{prediction['model_version']}: {_counts(prediction['result'])}")  # noqa: T201
    assert _counts(prediction["result"]) == {"purple circle": 1, "Triangle": 4}


def _refusal(api: httpx.Client) -> None:
    """The page shows the sentence of the backend."""
    context = {"result": [{"type": "keypointlabels", "value": {}}]}
    answer = api.post("/api/ml/1/interactive-annotating", json={"task": 1, "context": context}).json()
    print(answer)  # noqa: T201
    assert "Draw a rectangle" in answer["errors"][0]


def _page(studio: str, password: str, out: Path) -> None:
    """What an annotator does: open the task, draw a rectangle round the square, accept its mask, submit."""
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        page.set_default_timeout(TIMEOUT_MS)
        expect.set_options(timeout=TIMEOUT_MS)
        page.goto(f"{studio}/user/login/")
        page.fill("input[name=email]", EMAIL)
        page.fill("input[name=password]", password)
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/user/login" not in url)
        page.goto(f"{studio}/projects/1/data?task=1")
        expect(page.get_by_text("Triangle", exact=True)).to_have_count(5)  # the label and four regions
        page.get_by_text("Auto-Annotation").click()
        page.locator(".lsf-tool_smart").first.click()
        page.locator(".lsf-label").filter(has_text="Square").last.click()
        _settle(page)
        _draw(page, SQUARE)
        expect(page.get_by_text("1 suggestions")).to_be_visible()
        _settle(page)
        _save(page.screenshot(), out / "label-studio.png")
        page.get_by_test_id("bottombar-accept-suggestions-button").click()
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("Annotation saved successfully").first).to_be_visible()
        browser.close()


def _draw(page: Page, box: tuple[float, float, float, float]) -> None:
    place = page.locator(".konvajs-content").first.bounding_box()
    assert place is not None
    scale = place["width"] / 1280
    x0, y0, x1, y1 = (side * scale for side in box)
    page.mouse.move(place["x"] + x0 + 1, place["y"] + y0)
    page.mouse.down()
    page.mouse.move(place["x"] + x1, place["y"] + y1, steps=10)
    page.mouse.up()


def _settle(page: Page) -> None:
    """Wait until the page looks the same twice: brushes are drawn after their regions are listed,
    and a busy page misses the start of a drawing.
    """
    before = b""
    while (now := page.screenshot()) != before:
        before = now
        page.wait_for_timeout(500)


def _save(png: bytes, path: Path) -> None:
    """With 256 colours, a third of the bytes."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def _export(api: httpx.Client) -> None:
    """The submitted annotation as Label Studio exports it."""
    exported = api.get("/api/projects/1/export", params={"exportType": "JSON"}).raise_for_status().json()
    regions = exported[0]["annotations"][0]["result"]
    print(f"exported: {_counts(regions)}")  # noqa: T201
    assert _counts(regions) == {"purple circle": 1, "Triangle": 4, "Square": 1}


def _counts(regions: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(region["value"][region["type"]][0] for region in regions))


if __name__ == "__main__":
    main()
