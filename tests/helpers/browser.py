"""Headless Chromium: pages as a reader's browser shows them, and what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
SYSTEM = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser: playwright's own, else the system's; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = None
        for path in (None, *filter(None, map(shutil.which, SYSTEM))):
            with contextlib.suppress(sync_api.Error):
                browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
                break
        if browser is None:
            pytest.skip("there is no Chromium here: playwright install chromium, or apt-get install chromium")
        yield browser
        browser.close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, served from this process."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def problems(browser: Any, address: str, width: str, picture: Path | None = None, network: bool = True) -> list[str]:
    """What is wrong with a page: errors in the console, requests that fail, broken pictures, sideways scrolling.

    Args:
        browser: of :func:`chromium`.
        address: of the page.
        width: a key of WIDTHS.
        picture: where a screenshot of the whole page is kept.
        network: False: the page may ask nothing of anybody.
    """
    found: list[str] = []
    page = browser.new_page(viewport=dict(zip(("width", "height"), WIDTHS[width])))
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda request: found.append(f"no answer: {request.url}"))
    page.on("response", lambda answer: found.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    if not network:
        page.on(
            "request", lambda request: None if _inside(request.url, address) else found.append(f"asks {request.url}")
        )
    page.goto(address, wait_until="load")
    pictures = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 100))"
    found += [f"picture: {source}" for source in page.evaluate(pictures)]
    if page.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1"):
        found.append("scrolls sideways")
    if picture is not None:
        page.screenshot(path=str(picture), full_page=True)
    page.close()
    return found


def _inside(url: str, address: str) -> bool:
    return url == address or url.startswith(("data:", "blob:"))
