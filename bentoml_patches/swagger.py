"""Swagger UI without BentoML's own page, which loads a tag manager from another host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi.openapi.docs import get_swagger_ui_html

if TYPE_CHECKING:
    from fastapi.responses import HTMLResponse

ASSETS = "static_content"
"""The path under which BentoML serves its copy of Swagger UI."""


def swagger_page(openapi_url: str, title: str) -> HTMLResponse:
    """The page, from the assets that BentoML serves."""
    return get_swagger_ui_html(
        openapi_url=openapi_url,
        title=title,
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon-light-32x32.png",
    )
