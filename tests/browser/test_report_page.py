"""The page of a report in a real browser: nothing is fetched, nothing complains, nothing runs over, in light and dark.

Screenshots are written where pytest keeps the temporary folders of its last runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from cluster.debian_packages import require
from dispersion_pretrain.report import write_report
from report_runs import NASTY, make_run, seeded, two_arms, write_accuracies, write_scores

# Root needs --no-sandbox; the rest keeps Chromium from asking its maker's servers for anything.
OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDTHS = (1280, 420)
# Elements that reach beyond the window's right edge although nothing around them scrolls.
RUNNING_OVER = """() => [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !element.closest(".scroll") && !element.closest("svg");
}).map(element => element.tagName + "." + element.className)"""
# Cells and headings whose text is cut off or lies over that of the next one.
CUT_OFF = """() => [...document.querySelectorAll("td, th, h1, h3, li, p")].filter(
    element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth
).map(element => element.tagName + ": " + element.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require({"chromium": "chromium"})
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
        yield chromium
        chromium.close()


def faults(browser: Browser, page: Path, width: int, scheme: str, picture: Path) -> tuple[list[str], str]:
    """What is wrong with a page in such a window, and the text that a reader sees; takes a picture of all of it."""
    found: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    try:
        tab: Page = context.new_page()
        tab.on("console", lambda message: found.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: found.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: found.append(f"dialog: {dialog.message}"))
        tab.on("dialog", lambda dialog: dialog.dismiss())
        tab.on("request", lambda request: found.extend({f"request: {request.url}"} - {f"request: {page.as_uri()}"}))
        tab.goto(page.as_uri())
        for details in tab.query_selector_all("summary"):
            details.click()
        wide = tab.evaluate("document.documentElement.scrollWidth")
        found += [f"scrolls sideways: {wide}"] * (wide > width)
        found += [f"runs over: {element}" for element in tab.evaluate(RUNNING_OVER)]
        found += [f"cut off: {element}" for element in tab.evaluate(CUT_OFF)]
        tab.screenshot(path=picture, full_page=True)
        return found, tab.inner_text("body")
    finally:
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six runs of two arms, two runs of one seed, and two runs whose names are hostile."""
    folder = tmp_path_factory.mktemp("pages")
    six = two_arms(folder / "six", 0.0)
    two = two_arms(folder / "two", 0.08, seeds=(0,))
    long = "a_rather_long_name_of_a_run_" * 3
    hostile = [make_run(folder / NASTY, settings=seeded(NASTY, 0)), make_run(folder / long, settings=seeded(long, 0))]
    for run in hostile:
        write_scores(run, 20, 0.5)
    many = []
    for place in range(7):
        many.append(make_run(folder / f"rate{place}", settings=seeded("r", 0, dispersion={"coefficient": place})))
        write_accuracies(many[-1], {f"task_{n}": np.eye(40)[place] for n in range(8)})
    cases = {"six": six, "two": two, "hostile": hostile, "many": many, "one": two[:1]}
    return {name: write_report(runs, folder / f"{name}.html") for name, runs in cases.items()}


SENTENCES = {
    "six": [
        "6 runs in 2 arms, baseline (seeds 0, 1, 2) and dispersion (seeds 0, 1, 2), which differ in dispersion.",
        "not significant",
        "7 tasks, not significant",
    ],
    "two": ["significantly better", "7 tasks, significant", "Seeds were not varied in pairs for dispersion"],
    "hostile": [NASTY, "intervals rest on the scores' standard errors"],
    "many": ["7 runs", "signed-rank test over tasks, acc: rate1, rate2, rate3, rate4, rate5 and rate6 too few tasks."],
    "one": ["One run, base_s0, of 30k tokens."],
}


@pytest.mark.parametrize("name", SENTENCES)
def test_page_is_whole_in_every_window(browser: Browser, pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    for width in WIDTHS:
        for scheme, is_dark in (("light", False), ("dark", True)):
            picture = tmp_path / f"{name}-{width}-{scheme}.png"
            found, text = faults(browser, pages[name], width, scheme, picture)
            assert found == []
            for sentence in SENTENCES[name]:
                assert sentence in text
            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("L"))
            assert pixels.shape[1] == width
            assert (np.median(pixels) < 60) == is_dark, "the ground follows the scheme"
            assert len(np.unique(pixels)) > 50, "and something is drawn on it"


@pytest.mark.parametrize(
    ("addition", "fault"),
    [
        ('<div style="width: 3000px">wide</div>', "scrolls sideways"),
        ('<div style="overflow: hidden"><p style="width: 3000px">wide</p></div>', "runs over"),
        ('<p style="width: 40px; overflow: hidden; white-space: nowrap">a long line</p>', "cut off"),
        ("<script>console.error('no')</script>", "console"),
        ("<script>alert(1)</script>", "dialog"),
        ("<script>nothing()</script>", "error"),
        ('<img src="http://127.0.0.1:9/x.png" alt="">', "request"),
    ],
)
def test_a_fault_is_found(browser: Browser, pages: dict[str, Path], tmp_path: Path, addition: str, fault: str) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        pages["one"].read_text(encoding="utf-8").replace("</main>", f"{addition}</main>"), encoding="utf-8"
    )
    found, _ = faults(browser, broken, 1280, "light", tmp_path / "broken.png")
    assert any(one.startswith(fault) for one in found), found
