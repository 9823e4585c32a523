"""Swagger UI from BentoML's assets, without BentoML's page."""

from __future__ import annotations

import re
from pathlib import Path

import bentoml
from _bentoml_impl import server

from bentoml_patches import swagger


def test_bentoml_has_the_assets() -> None:
    """Each file that the page asks for is in BentoML's folder of static files."""
    page = bytes(swagger.swagger_page("docs.json", "title").body).decode()
    names = re.findall(rf"{swagger.ASSETS}/([^\"']+)", page)
    assert len(names) == 3
    assets = {path.name for path in Path(bentoml.__file__).parent.rglob("static_content/*")}
    assert set(names) <= assets


def test_the_page_of_our_own_is_needed() -> None:
    """BentoML's own page loads a script from another host."""
    page = (Path(server.__file__).parent / "main-openapi.html").read_text()
    assert re.search(r"https://[^\"' ]+\.js|googletagmanager", page)
