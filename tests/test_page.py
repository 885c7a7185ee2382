"""Reports as HTML: what is shown is escaped, embedded and whole, also in a browser without a network."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

import pytest
from helpers.browser import WIDTHS, chromium, problems

from lara_adapter import HostNotInstalled
from lara_adapter.evaluation.page import write_report_page
from lara_adapter.evaluation.report import make_report
from lara_adapter.lam.health.motion import Estimate, Motion
from lara_adapter.lam.health.page import write_health_page
from lara_adapter.lam.health.probe import ProbeResult
from lara_adapter.lam.health.verdicts import Finding, GapHealth, HealthReport
from lara_adapter.lam.measure import LatentHealth
from lara_adapter.page import Bars, Curves, Film, Picture, Table, Text, write_page

jinja2 = pytest.importorskip("jinja2")
NASTY = "<script>alert('x')</script> & \"quotes\""


def make_film(path) -> None:
    import numpy as np

    from lara_adapter.evaluation.film import Film as Recorder

    pytest.importorskip("av")
    film = Recorder(path, fps=20)
    for step in range(4):
        film.add(lambda step=step: np.full((32, 32, 3), 60 * step, np.uint8))
    film.write()


def make_picture(path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 20), (200, 30, 30)).save(path)


@pytest.fixture
def report(tmp_path):
    make_picture(tmp_path / "a.png")
    parts = [
        Text("Findings", [("ok", "codes: 100 of 128"), ("fail", NASTY), ("", "a line")]),
        Table(NASTY, ("a", NASTY), [(1, NASTY), ("long " * 60, 2.5)], note=NASTY),
        Bars("Success", {NASTY: (0.5, 0.2, 0.8, "5 of 10"), "none": (0.0, 0.0, 0.3, "0 of 10")}, "95 %"),
        Curves("Loss", "step", {"one": [(0, 1.0), (10, float("nan")), (20, 0.5)], NASTY: [(0, 2.0)]}),
        Curves("Nothing", "step", {}),
        Picture("Shown", tmp_path / "a.png"),
        Picture("Missing", tmp_path / "b.png"),
    ]
    return write_page(tmp_path / "page.html", NASTY, "A summary", parts)


def test_everything_is_escaped_and_nothing_is_asked_for(report):
    html = report.read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quotes&#34;") >= 9
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "default-src 'none'" in html
    assert "b.png is not shown" in html
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL)).lower()


def test_the_page_of_an_evaluation(tmp_path):
    make_film(tmp_path / "videos" / "open-0.mp4")
    runs = [{"seed": seed, "success": seed < 2, "steps": 30, "requests": 4, "seconds": 1.0} for seed in range(3)]
    report = make_report({"policy": NASTY, "simulator": "metaworld"}, {"open": runs, "close": runs})
    page = write_report_page(report, tmp_path)
    html = page.read_text()
    assert "4 of 6 episodes solved in metaworld" in html
    assert html.count("<video") == 1
    assert "data:video/mp4;base64," in html
    assert "open, seed 0: solved after 30 steps" in html
    assert str(tmp_path) not in html


def make_health() -> HealthReport:
    def gap(frames: int, ratio: float) -> GapHealth:
        return GapHealth(frames, LatentHealth(256, 0.01, 0.02, ratio, 90, 60.5, 0.4, 0.73), 0.1, 0.02)

    estimate = Estimate(0.321, 0.2, 0.4)
    motion = Motion(estimate, estimate, None, estimate, estimate, None, None, None, None, 256, 10, 5)
    return HealthReport(
        lam={"name": "my-lam", "codebook_size": 128}, data=NASTY, camera="top", clips=10, skipped=1, fps=30.0,
        gaps=[gap(4, 0.9), gap(8, 0.7), gap(16, math.nan), GapHealth(64, None, math.nan, 1.0)], judged=8, chosen=True,
        probes={"mean": ProbeResult(0.51, 256, 10, 5)}, motion={"action": motion},
        findings=[Finding("codes", "ok", "60.5 of 128"), Finding("reconstruction", "fail", NASTY)],
    )  # fmt: skip


def test_the_page_of_a_latent_action_models_health(tmp_path):
    html = write_health_page(make_health(), tmp_path / "health.html").read_text()
    assert "Not healthy at a gap of 8 frames: 10 clips of &lt;script&gt;" in html
    assert 'class="fail">reconstruction: &lt;script' in html
    assert html.count("<svg") == 4
    assert "0.510" in html
    assert "0.32 (0.20 to 0.40)" in html
    assert "nan" not in html


@pytest.mark.slow
def test_a_browser_shows_it_without_a_network(report, tmp_path):
    make_film(tmp_path / "film.mp4")
    films = write_page(tmp_path / "films.html", "Films", "one", [Film("Films", {"first": tmp_path / "film.mp4"})])
    health = write_health_page(make_health(), tmp_path / "health.html")
    kept = os.environ.get("LARA_SCREENSHOTS")
    with chromium() as browser:
        for page in (report, films, health):
            for width in WIDTHS:
                picture = Path(kept) / f"report-{page.stem}-{width}.png" if kept else None
                found = problems(browser, page.as_uri(), width, picture, network=False)
                assert not found, (page.name, width)
        shown = browser.new_page()
        shown.goto(films.as_uri())
        shown.wait_for_function("document.querySelector('video').readyState >= 1", timeout=20000)
        assert shown.evaluate("document.querySelector('video').videoWidth") == 32


def test_without_jinja2_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(HostNotInstalled, match=r"pip install 'lara-adapter\[report\]'"):
        write_page(tmp_path / "page.html", "a", "b", [])
    assert not (tmp_path / "page.html").exists()
