"""The built site in headless Chromium: each page at desktop and phone width; its links and anchors.

LARA_SITE=outputs/site tests a site that `make docs` has built, in place of building one. LARA_SCREENSHOTS=FOLDER keeps a
picture of each page.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers.browser import WIDTHS, chromium, problems, served

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if os.environ.get("LARA_SITE"):
        return (ROOT / os.environ["LARA_SITE"]).resolve()
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="the site needs the extra docs")
    folder, tree = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("tree")
    copied = tree / "lara_adapter"  # as the wheel lays it out
    copied.mkdir()
    for path in (ROOT / "lara_adapter").iterdir():
        (copied / path.name).symlink_to(path)
    (copied / "integrations").symlink_to(ROOT / "integrations")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT, text=True,
        env={**os.environ, "LARA_DOCS_SOURCE": str(copied.parent), "NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pages(site: Path) -> list[str]:
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))


def test_every_page_of_the_navigation_is_there(site):
    named = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(pages(site)) == {f"{name}.html" for name in named} | {"404.html"}


def test_links_lead_somewhere(site):
    text = {page: (site / page).read_text() for page in pages(site) if page != "404.html"}
    dead = []
    for page, html in text.items():
        for link in set(re.findall(r'<(?:a|link|img|script)[^>]*\s(?:href|src)="([^"]*)"', html)):
            if re.match(r"[a-z]+:", link) or not link:
                continue
            target, _, anchor = unescape(unquote(link)).partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
            path = "index.html" if path == "." else path
            if not (site / path).exists():
                dead.append(f"{page}: {link}")
            elif anchor and path in text and not re.search(rf'(?:id|name)="{re.escape(anchor)}"', text[path]):
                dead.append(f"{page}: {link} (no such anchor)")
    assert not dead


@pytest.mark.slow
def test_no_page_has_a_broken_picture_or_an_error(site):
    pictures = os.environ.get("LARA_SCREENSHOTS")
    wrong = {}
    with chromium() as browser, served(site) as address:
        for page in pages(site):
            for width in WIDTHS:
                name = f"{page.removesuffix('.html').replace('/', '-')}-{width}.png"
                picture = Path(pictures) / name if pictures else None
                if page != "404.html" and (found := problems(browser, f"{address}/{page}", width, picture)):
                    wrong[f"{page}, {width}"] = found
    assert not wrong
