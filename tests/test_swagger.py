"""The Swagger page in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from commands.local_server import ROOT
from contract.requests import EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Locator, Page

    from commands.local_server import LocalServer

pytestmark = [pytest.mark.server, pytest.mark.browser]

ROUTES = {
    ("get", "/health"),
    ("post", "/api/v1/predict"),
    ("post", "/api/v1/predict/batch"),
    ("post", "/v1/images/segmentations"),
    ("get", "/api/v1/model/info"),
}
ERRORS = ("400", "401", "403", "404", "409", "413", "415", "429", "500", "502", "503", "504")
WAIT_MS = 30_000


@pytest.fixture
def requested() -> list[str]:
    """The URLs that the page requested."""
    return []


@pytest.fixture
def faults() -> list[str]:
    """The errors of the page's scripts."""
    return []


@pytest.fixture
def page(browser: Browser, server: LocalServer, requested: list[str], faults: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    opened = context.new_page()
    opened.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    opened.on("request", lambda request: requested.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(f"{server.url}/")
    expect(opened.locator(".opblock")).to_have_count(len(ROUTES))
    yield opened
    context.close()


def operation(page: Page, method: str, path: str) -> Locator:
    """The block of one route."""
    exact = page.locator(f'.opblock-summary-path[data-path="{path}"]')
    return page.locator(f".opblock-{method}").filter(has=exact)


def test_all_routes_are_shown(page: Page, faults: list[str], tmp_path: Path) -> None:
    """The page at / shows the demo's five routes and no others."""
    shown = {
        (
            block.locator(".opblock-summary-method").inner_text().lower(),
            block.locator(".opblock-summary-path").get_attribute("data-path"),
        )
        for block in page.locator(".opblock").all()
    }
    assert shown == ROUTES
    page.screenshot(path=tmp_path / "swagger.png", full_page=True)
    assert faults == []


def test_predict_shows_its_fields_and_errors(page: Page, tmp_path: Path) -> None:
    """The section of predict shows the fields of request and answer, and the model of every error."""
    block = operation(page, "post", "/api/v1/predict")
    block.locator(".opblock-summary-control").click()
    request = block.locator(".opblock-section-request-body")
    for field in ("image_url", "text_prompt", "user_id", "task_id"):
        expect(request).to_contain_text(field)
    answers = block.locator(".responses-table.live-responses-table, .responses-wrapper").last
    for field in ("mask_url", "labels", "inference_time_ms", "confidence", "instances"):
        expect(answers.locator('tr.response[data-code="200"]')).to_contain_text(field)
    for status in ERRORS:
        answer = answers.locator(f'tr.response[data-code="{status}"]')
        expect(answer).to_contain_text("request_id")
        expect(answer).to_contain_text("message")
    expect(answers.locator('tr.response[data-code="422"]')).to_have_count(0)
    expect(page.locator(".models")).to_contain_text("ErrorResponse")
    page.screenshot(path=tmp_path / "predict.png", full_page=True)


def test_page_sends_requests_only_to_the_server(page: Page, requested: list[str]) -> None:
    """The page works without internet, and sends no requests to other hosts."""
    page.wait_for_load_state("networkidle")
    assert any(url.endswith("docs.json") for url in requested)
    assert {urlsplit(url).hostname for url in requested if not url.startswith("data:")} == {"127.0.0.1"}


def authorize(page: Page, server: LocalServer) -> None:
    """Enter the key at Authorize."""
    page.locator("button.authorize").first.click()
    page.locator(".auth-container input").fill(server.api_key)
    page.locator(".auth-container button.authorize").click()
    page.locator(".auth-container button.btn-done").click()


def opened(page: Page, method: str, path: str) -> Locator:
    """The block of one route, ready to be tried out."""
    block = operation(page, method, path)
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def execute(block: Locator, status: str) -> Locator:
    """Send the request as it is filled in; returns the answer, which has this status."""
    clear = block.get_by_role("button", name="Clear", exact=True)
    if clear.count():
        clear.click()
        expect(block.locator(".live-responses-table")).to_have_count(0)
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response")
    expect(answer.locator(".response-col_status")).to_contain_text(status)
    return answer


@pytest.mark.parametrize("path", ["/api/v1/predict", "/api/v1/predict/batch"])
def test_every_example_works_as_prefilled(page: Page, server: LocalServer, path: str) -> None:
    """Each example is answered with instances, and again when it is sent a second time."""
    authorize(page, server)
    block = opened(page, "post", path)
    names = block.locator(".opblock-section-request-body .examples-select option").all_inner_texts()
    assert len(names) == len(EXAMPLES[path])
    for index in range(len(names)):
        block.locator(".opblock-section-request-body .examples-select select").select_option(index=index)
        for _ in range(2):
            expect(execute(block, "200")).to_contain_text('"number": 1')


def test_direct_route_works_with_a_file(page: Page, server: LocalServer) -> None:
    """With a picture chosen, the form is answered as it is prefilled, repeatedly."""
    authorize(page, server)
    block = opened(page, "post", "/v1/images/segmentations")
    block.locator("input[type=file]").set_input_files(ROOT / "examples" / "sample.jpg")
    for _ in range(2):
        expect(execute(block, "200")).to_contain_text('"presence"')


@pytest.mark.parametrize("authorized", [True, False])
def test_try_it_out_needs_the_key(page: Page, server: LocalServer, *, authorized: bool) -> None:
    """With the key entered at Authorize a route answers 200, without it 401."""
    if authorized:
        authorize(page, server)
    answer = execute(opened(page, "get", "/api/v1/model/info"), "200" if authorized else "401")
    expect(answer).to_contain_text("SAM3" if authorized else "AUTH_REQUIRED")
