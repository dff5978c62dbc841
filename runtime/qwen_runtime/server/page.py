"""The page at ``/``: a chat and live figures in one HTML document."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

__all__ = ["page_route", "render_page"]


def page_route() -> Route:
    """The route ``/``. The page finds the API by relative addresses, under any mount point."""
    document, policy = render_page()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page(_: Request) -> Response:
        return HTMLResponse(document, headers=headers)

    return Route("/", page, methods=["GET"])


@cache
def render_page() -> tuple[str, str]:
    """Put the page together from its files.

    Returns:
        The document, which refers to nothing outside itself, and the Content-Security-Policy
        under which it runs: its own script and style by their sha256, connections to the server
        that sent it, and nothing else.
    """
    folder = files("qwen_runtime.server")
    style = folder.joinpath("page.css").read_text("utf-8")
    script = "".join(
        folder.joinpath(name).read_text("utf-8") for name in ("page_metrics.js", "page.js")
    )
    document = folder.joinpath("page.html").read_text("utf-8")
    document = document.replace("<!-- style -->", f"<style>{style}</style>")
    document = document.replace("<!-- script -->", f'<script type="module">{script}</script>')
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return document, policy


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
