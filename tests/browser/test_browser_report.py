"""The report in a real browser: it loads alone, whole and quietly, fits a phone, and follows a running job."""

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, Commands
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright
from scripted import Script

from distgrow.planning.forecast import foresee
from distgrow.report.write import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
ARTIFACTS = ROOT / "artifacts"
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1400, "height": 900}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@dataclass
class Opened:
    """A page, and what it has said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def shot(self, name: str) -> None:
        """Keep a picture of the whole page."""
        ARTIFACTS.mkdir(exist_ok=True)
        (ARTIFACTS / f"{name}.png").write_bytes(self.page.screenshot(full_page=True))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, with a fresh profile."""
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Browser, address: str, size: dict[str, int], *, dark: bool = False) -> Iterator[Opened]:
    """A page of a size in pixels."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport=ViewportSize(**size), color_scheme=scheme)
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.goto(address)
    yield found
    context.close()


def eventful() -> Script:
    """Growth, a skipped update, a retry after running out of memory, a resume, more workers, probes."""
    script = Script(samples_per_s=2000.0).event("start").stage(0, 16, 16)
    losses = [3 * 0.97**step + 0.1 for step in range(160)]
    script.updates(*losses[:40]).evaluate(loss=1.4, accuracy=0.5).skip()
    script.event("probe", norm=0.9, critical_batch=40.0, sfo=script.samples, sfo_probe=0)
    script.stage(1, 32, 32).updates(*losses[40:80]).evaluate(loss=0.5, accuracy=0.8)
    script.sfo["replayed"] += 320
    script.event("resume", checkpoint="step-00000080", sfo_replayed=320).stage(1, 32, 32).updates(*losses[80:100])
    script.sfo["discarded"] += 64
    script.stage(2, 64, 64).event("oom", micro=64, sfo_discarded=64).stage(2, 64, 32).updates(*losses[100:130])
    script.event("resize", old=1, new=2, seconds=4.0).stage(3, 128, 64).updates(*losses[130:])
    script.event("probe", norm=0.1, critical_batch=300.0, sfo=script.samples, sfo_probe=0)
    for event in script.events:
        if event["event"] == "step":
            event["noise_scale"] = 20 + event["step"] * 2
    return script.evaluate(loss=0.2, accuracy=0.97).end()


def constant() -> Script:
    """As many samples at one batch."""
    script = Script(samples_per_s=2000.0).event("start").stage(0, 16, 16)
    script.updates(*(3 * 0.992**step + 0.1 for step in range(500)))
    return script.evaluate(loss=0.3, accuracy=0.95).end()


CONFIG = (
    "growth: {kind: exponential, start: 16, factor: 2, cap: 128}\nstages: {every: {samples: 1300}}\nlr: {base: 0.05}\n"
    "budget: {samples: 8000}\ntheory: {smoothness: 2.0, variance: 3.0, gap: 2.0, epsilon: 0.5}\n"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report of two runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = [eventful().save(folder / "growing", CONFIG), constant().save(folder / "constant")]
    write(runs, str(folder / "out"), foresee, update_s=0.2)
    return (folder / "out" / "report.html").as_uri()


def test_long_names_widen_neither_the_page_nor_the_columns_that_they_head(browser: Browser, tmp_path: Path) -> None:
    long = "run_" + "0123456789" * 8
    runs = [eventful().save(tmp_path / f"{long}a", CONFIG), constant().save(tmp_path / f"{long}b")]
    write(runs, str(tmp_path / "out"), foresee, update_s=0.2)
    with opened(browser, (tmp_path / "out" / "report.html").as_uri(), PHONE) as shown:
        shown.shot("report-long-names")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        widths = shown.page.eval_on_selector_all(".names th", "cells => cells.map(cell => cell.offsetWidth)")
        assert len(widths) == 3
        assert max(widths) < PHONE["width"] / 2


@pytest.mark.parametrize(
    ("name", "size", "dark"),
    [
        ("phone", PHONE, False),
        ("desktop", DESKTOP, False),
        ("phone-dark", PHONE, True),
        ("desktop-dark", DESKTOP, True),
    ],
)
def test_the_report_is_whole_loads_nothing_says_nothing_and_never_scrolls_sideways(
    browser: Browser, report: str, name: str, size: dict[str, int], dark: bool
) -> None:
    with opened(browser, report, size, dark=dark) as shown:
        shown.shot(f"report-{name}")
        page = shown.page
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) == 3 * 7  # axes, panels
        assert min(widths) > 0
        headings = page.locator("section h3").all_inner_texts()
        assert headings[:7] == [
            "Last evaluation and cost", "What differs between the configs",
            "Where 8,720 gradient evaluations (SFO) went", "Planned and actual", "At a constant batch of 16",
            "Stages", "Events",
        ]  # fmt: skip
        assert page.locator("table").count() == 10  # two of all runs; five of the first run, three of the second
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        segments = page.eval_on_selector_all(".bar span", "parts => parts.map(part => part.offsetWidth)")
        assert min(segments) >= 5
        assert shown.said == []
        assert [url for url in shown.asked if not url.startswith("data:")] == [report]


def test_one_axis_is_shown_at_a_time_and_a_touch_shows_another(browser: Browser, report: str) -> None:
    with opened(browser, report, PHONE) as shown:
        page = shown.page
        panels = [page.locator(f".by-{axis}") for axis in ("sfo", "step", "time_s")]
        assert [shown.is_visible() for shown in panels] == [True, False, False]
        page.locator("label[for=by-time_s]").click()
        assert [shown.is_visible() for shown in panels] == [False, False, True]


def test_without_scripts_the_plots_and_the_switch_of_the_axis_are_there(browser: Browser, report: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    assert page.locator(".by-sfo img").first.is_visible()
    page.locator("label[for=by-step]").click()
    assert page.locator(".by-step img").first.is_visible()
    assert not page.locator(".by-sfo img").first.is_visible()
    context.close()


def test_the_values_of_all_runs_are_shown_where_the_reader_points(browser: Browser, report: str) -> None:
    with opened(browser, report, DESKTOP) as shown:
        page = shown.page
        page.locator("label[for=by-step]").click()
        page.locator(".by-step .plot").last.scroll_into_view_if_needed()
        # scrolling hides the values, one frame later
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        box = page.locator(".by-step .plot").last.bounding_box()  # the learning rate: 0.16, 0.32, … and 0.16 throughout
        assert box is not None
        page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + box["height"] / 2)
        assert page.locator("#tip").inner_text().split("\n") == ["growing: 1.28 at 160", "constant: 0.16 at 500"]
        page.mouse.move(0, 0)
        assert not page.locator("#tip").is_visible()
        assert shown.said == []


def test_the_config_opens_at_a_touch(browser: Browser, report: str) -> None:
    with opened(browser, report, PHONE) as shown:
        config = shown.page.locator("details").first
        assert not config.locator("pre").is_visible()
        config.locator("summary").click()
        assert "kind: exponential" in config.locator("pre").inner_text()
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


# ── the live view ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def serving(distgrow: Commands, *runs: str) -> Iterator[str]:
    """The address of `distgrow report --serve`."""
    absent = [run for run in runs if not (distgrow.folder / run).exists()]
    server = distgrow.start("report", "--serve", *runs, "--port", "0")
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-3]
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        waited = "".join(f"{run} does not exist yet: it is waited for\n" for run in absent)
        assert (server.returncode, out, err) == (0, "", waited)
    finally:
        server.kill()
        server.wait()


def updates(shown: Opened) -> int:
    """The number in the results' column of updates; 0 while there is none."""
    head = shown.page.locator("#content table").first.locator("th").all_inner_texts()
    cells = shown.page.locator("#content table").first.locator("tbody td").all_inner_texts()
    return int(cells[head.index("updates")].replace(",", "")) if "updates" in head else 0


def rises(shown: Opened, above: int) -> int:
    """The number of updates, once the page shows more than `above`."""
    shown.page.wait_for_function(
        "least => { const head = [...document.querySelectorAll('#content table:first-of-type th')];"
        " const place = head.findIndex(cell => cell.innerText === 'updates');"
        " const cell = document.querySelectorAll('#content table:first-of-type td')[place];"
        " return cell && Number(cell.innerText.replaceAll(',', '')) > least; }",
        arg=above, timeout=90_000,
    )  # fmt: skip
    return updates(shown)


def test_the_live_view_follows_a_running_job_to_its_end_without_a_reload(browser: Browser, distgrow: Commands) -> None:
    with serving(distgrow, "run") as address, opened(browser, address, PHONE) as shown:
        page = shown.page
        page.get_by_text("waiting for the first update of run").wait_for(timeout=60_000)
        page.evaluate("window.neverReloaded = true")
        job = distgrow.start(
            "train",
            str(ROOT / "configs/digits.yaml"),
            "run.dir=run",
            "budget={epochs: 100000}",
            "run.eval.every_steps=5",
        )
        try:
            first = rises(shown, 0)
            page.locator("summary").first.click()
            page.wait_for_selector("img", timeout=90_000)
            page.evaluate("window.scrollTo(0, 300)")
            second = rises(shown, first)
            third = rises(shown, second)
            assert first < second < third
            assert page.locator("details").first.get_attribute("open") is not None
            assert page.evaluate("window.scrollY") == 300
            (distgrow.folder / "run" / ".stop").touch()
            assert job.wait(timeout=60) == 0
        finally:
            job.kill()
            job.communicate()
        page.get_by_text("stopped on request").first.wait_for(timeout=30_000)
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        assert len(widths) == 3 * 6
        assert min(widths) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        shown.shot("live-phone")
        assert page.evaluate("window.neverReloaded") is True
        assert re.match(r"live, as of \d.*; the last line was written \d+ s ago", page.locator("#state").inner_text())
        assert shown.said == []
        assert all(url.startswith((address, "data:")) for url in shown.asked)


def test_the_live_view_says_when_its_server_is_gone(browser: Browser, distgrow: Commands) -> None:
    constant().save(distgrow.folder / "run")
    with serving(distgrow, "run") as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.get_by_text("live, as of").wait_for(timeout=60_000)
    page.get_by_text("is distgrow report --serve still running?").wait_for(timeout=30_000)
    assert page.locator("#content table").count() >= 4  # what was last known stays
    context.close()
