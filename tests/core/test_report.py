"""Reports of run folders that are written by hand: the files, the page, the command."""

import base64
import json
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import Commands
from scripted import Script, crashed, short

from distgrow.report.page import page
from distgrow.report.planned import Forecast, Planned, Target
from distgrow.report.runs import read
from distgrow.report.sections import shorten, stages
from distgrow.report.write import write

FILES = ["against_sfo.png", "against_steps.png", "against_seconds.png", "report.html"]


class Page(HTMLParser):
    """The text of all tables' cells, also by their headings, tags left open, and everything that would be loaded."""

    VOID = ("meta", "img", "link", "input", "line")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open, self.tables, self.loads = list[str](), list[list[list[str]]](), list[str]()
        self.headed = dict[str, list[list[str]]]()
        self.text = self.heading = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "h3":
            self.heading = ""
        elif tag == "table":
            self.tables.append([])
            self.headed[self.heading] = self.tables[-1]
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h3":
            self.heading += data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


# ── the files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_files_named_are_written_into_the_first_run(tmp_path: Path) -> None:
    first, second = short().save(tmp_path / "first"), crashed().save(tmp_path / "second")
    (tmp_path / "first" / "report.html").write_text("of an earlier report")
    text = write([first, second], None)
    assert text.split() == ["wrote", *(f"{first}/{name}" for name in FILES)]
    assert (tmp_path / "first" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for name in FILES[:3]:
        content = (tmp_path / "first" / name).read_bytes()
        width, height = size(content)
        assert width == 900
        assert 1200 < height < 2600
        assert len(content) < 1_000_000
    assert {path.name for path in (tmp_path / "second").iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_the_page_is_well_formed_and_loads_nothing_but_the_plots_inside_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    write([short().save(tmp_path / "run")], str(out))
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "metrics.jsonl"}
    source = (out / "report.html").read_text(encoding="utf-8")
    parsed = Page(source)
    assert not parsed.open
    icon, *images = parsed.loads
    assert icon == "data:,"
    assert [load.partition(",")[0] for load in images] == ["data:image/png;base64"] * 6 * 3  # panels, axes
    assert all(size(base64.b64decode(load.partition(",")[2]))[0] > 700 for load in images)
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source


def test_the_values_to_point_at_are_those_of_the_run_and_no_name_ends_the_script(tmp_path: Path) -> None:
    run = short().save(tmp_path / "<" / "script>")
    write([run], str(tmp_path / "out"))
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    values = json.loads(source.partition('id="values">')[2].partition("</script>")[0])
    assert [run["name"] for run in values["runs"]] == ["script>"]
    rate = [panel["points"][0] for panel in values["axes"]["step"]][-1]
    assert rate == {"x": [1, 2, 3, 4, 5], "y": [0.08, 0.08, 0.16, 0.16, 0.16]}
    evaluated = [panel["points"][0] for panel in values["axes"]["sfo"]][2]
    assert evaluated == {"x": [64], "y": [0.75]}
    left, top, right, bottom = values["axes"]["sfo"][0]["box"]
    assert 0 < left < right <= 1
    assert 0 < top < bottom < 1


# ── what the page says ──────────────────────────────────────────────────────────────────────────────────────────────


def parsed_page(*runs: str) -> Page:
    """The page of some runs, without the pictures."""
    return Page(page(read(runs), {}))


def shown(script: Script, folder: Path, heading: str) -> list[list[str]]:
    """The rows of one table of a run's page."""
    return parsed_page(script.save(folder)).headed[heading][1:]


@pytest.mark.parametrize("script", [short(), crashed(), short().stage(2, 32, 8).skip().skip().updates(0.1)])
def test_the_ledger_shown_adds_up_to_what_the_run_counted(tmp_path: Path, script: Script) -> None:
    parsed = parsed_page(script.save(tmp_path / "run"))
    total = sum(script.sfo.values())
    rows = parsed.headed[f"Where {total:,} gradient evaluations (SFO) went"]
    assert {row[0]: int(row[1].replace(",", "")) for row in rows} == {k: n for k, n in script.sfo.items() if n}


def test_updates_without_a_line_are_in_the_ledger(tmp_path: Path) -> None:
    script = short()
    script.events = [event for event in script.events if event["event"] != "step" or event["step"] % 2 == 0]
    heading = "Where 64 gradient evaluations (SFO) went"
    assert parsed_page(script.save(tmp_path / "run")).headed[heading] == [["applied", "64", "100.00%"]]


def test_the_stage_table_holds_the_stages_of_the_run(tmp_path: Path) -> None:
    assert shown(short(), tmp_path / "run", "Stages") == [
        ["0", "8 = 1 × 8 × 1", "0.08", "2", "16", "0.00 – 0.16", "1.0", "16", "16"],
        ["1", "16 = 1 × 4 × 4", "0.16", "3", "48", "0.16 – 0.64", "1.5", "48", "64"],
    ]


def test_a_stage_that_a_resume_goes_on_with_has_one_row_and_one_more_if_split_otherwise(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(2.0).event("resume", sfo_replayed=0).stage(0, 8, 8).updates(1.0)
    script.event("resume", sfo_replayed=0).stage(0, 8, 4).updates(0.5)
    rows = shown(script, tmp_path / "run", "Stages")
    assert [row[1] for row in rows] == ["8 = 1 × 8 × 1", "8 = 1 × 4 × 2"]
    assert [row[3] for row in rows] == ["2", "1"]


def test_a_decaying_learning_rate_is_shown_from_its_first_to_its_last_value(tmp_path: Path) -> None:
    script = short()
    for event in script.events:
        if event["event"] == "step" and event["stage"] == 1:
            event["lr"] = 1 / event["step"]
    assert [row[2] for row in stages(read([script.save(tmp_path / "run")])[0])] == ["0.08", "0.3333 – 0.2"]


def test_thousands_of_stages_make_a_short_table() -> None:
    rows = shorten([[str(row)] for row in range(5000)], 200)
    assert rows[:150] == [[str(row)] for row in range(150)]
    assert rows[150] == ["… 4,800 more"]
    assert rows[151:] == [[str(row)] for row in range(4950, 5000)]
    assert shorten([["0"]] * 200, 200) == [["0"]] * 200


def test_results_compare_runs_with_different_metrics(tmp_path: Path) -> None:
    first = short().save(tmp_path / "first")
    second = Script().stage(0, 8, 8).updates(1.0).evaluate(loss=0.5, perplexity=1.6487).updates(1.0)
    head, *rows = parsed_page(first, second.save(tmp_path / "second")).tables[0]
    assert head == ["run", "test loss", "test accuracy", "test perplexity", *head[4:]]
    assert rows[0] == ["first", "0.5", "0.75", "—", "5", "64", "0.64", "2.5", "done"]
    assert rows[1] == ["second", "0.5", "—", "1.649", "2", "16", "0.16", "1.0", "not ended"]


def test_what_differs_between_the_configs_is_listed_by_key(tmp_path: Path) -> None:
    configs = [
        "growth: {kind: late, cap: 8}\nrun: {dir: a}\n",
        "growth: {kind: late, cap: 9, start: 2}\nrun: {dir: b}\n",
    ]
    runs = [short().save(tmp_path / str(index), config) for index, config in enumerate(configs)]
    rows = parsed_page(*runs).headed["What differs between the configs"]
    assert rows == [["", "0", "1"], ["growth.cap", "8", "9"], ["growth.start", "—", "2"]]
    assert "What differs between the configs" not in parsed_page(runs[0]).headed


@pytest.mark.parametrize("config", ["a: [", "a: &a [*a]\n", "!!python/object:os.system {}\n", "2026-13-45", "[" * 5000])
def test_a_config_that_is_none_is_shown_and_compared_with_nothing(tmp_path: Path, config: str) -> None:
    runs = [short().save(tmp_path / "odd", config), short().save(tmp_path / "even")]
    parsed = parsed_page(*runs)
    assert "What differs between the configs" not in parsed.headed
    assert config in parsed.text


def test_a_run_that_goes_on_says_what_share_is_spent_and_how_long_the_rest_takes(tmp_path: Path) -> None:
    script = Script().event("start", budget_samples=80).stage(0, 8, 8).updates(*[1.0] * 4)  # 8 samples in 0.5 s each
    state = parsed_page(script.save(tmp_path / "run")).tables[0][1][-1]
    assert state == "not ended: 40 %, 3 s left"


def test_any_name_is_shown_as_it_is(tmp_path: Path) -> None:
    names = ["<b>a&b<b>", "a$x^$b", "${title} $$", "_hidden", 'quo"te', "x" * 200]
    runs = [
        Script().stage(0, 8, 8).updates(1.0).evaluate(**{name: 0.5}).save(tmp_path / name, config=f"# {name}\n")
        for name in names
    ]
    write(runs, str(tmp_path / "out"))
    parsed = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert [row[0] for row in parsed.tables[0]] == ["run", *names]
    assert parsed.tables[0][0][1:7] == [f"test {name}" for name in names]
    assert all(f"# {name}\n" in parsed.text for name in names)
    assert not parsed.open


def test_the_bar_has_a_segment_for_each_part_of_the_ledger_as_wide_as_its_share_and_says_so(tmp_path: Path) -> None:
    source = page(read([crashed().save(tmp_path / "run")]), {})
    segments = re.findall(
        r'<span class="(\w+)" style="flex-grow: ([\d.]+)" title="([^"]+)">(?:<b>([^<]+)</b>)?', source
    )
    assert segments == [
        ("applied", "0.600000", "applied 60.0%", "applied 60.0%"),
        ("replayed", "0.400000", "replayed 40.0%", "replayed 40.0%"),
    ]
    assert 'role="img" aria-label="applied 60.0%, replayed 40.0%"' in source


def test_a_small_part_has_no_label_in_the_bar_but_a_title(tmp_path: Path) -> None:
    script = Script().stage(0, 90, 90).updates(1.0).stage(0, 10, 10).skip().updates(1.0)
    source = page(read([script.save(tmp_path / "run")]), {})
    assert '<span class="skipped" style="flex-grow: 0.090909" title="skipped 9.1%"></span>' in source


def test_a_constant_batch_costs_as_many_applied_evaluations_at_the_median_pace_of_that_batch(tmp_path: Path) -> None:
    script = Script(samples_per_s=80.0).stage(0, 8, 8).updates(1.0, 1.0)  # 0.1 s each
    script.samples_per_s = 1.0
    script.updates(1.0)  # a hiccup, which the median leaves out
    script.samples_per_s = 320.0
    script.stage(1, 32, 8).updates(1.0, 1.0)  # 0.1 s each, too
    script.sfo["probe"] = 1000  # a constant batch would be probed as much
    script.updates(1.0).end()
    script.events = [
        event for event in script.events if event["event"] != "step" or event["step"] != 5
    ]  # run.log_every
    run = script.save(tmp_path / "run")
    assert parsed_page(run).headed["At a constant batch of 8"][1:] == [
        ["serial updates", "6", "15", "2.5 ×"],
        ["seconds of updates", "0.6", "1.5", "2.5 ×"],
    ]
    text = page(read([run]), {}, update_s=0.5)
    assert Page(text).headed["At a constant batch of 8"][-1] == ["seconds at 0.5 s an update", "3.0", "7.5", "2.5 ×"]


def test_without_a_pace_in_the_step_lines_a_constant_batch_is_compared_by_updates_alone(tmp_path: Path) -> None:
    assert shown(short(), tmp_path / "run", "At a constant batch of 8") == [["serial updates", "5", "8", "1.6 ×"]]


def test_every_interruption_is_listed_in_the_order_of_the_run(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0).event("oom", micro=8).updates(1.0).skip()
    script.event("resume", checkpoint="step-00000002").stage(0, 8, 8).event("resize", old=1, new=2, seconds=3.0)
    assert shown(script.updates(1.0), tmp_path / "run", "Events") == [
        ["out of memory", "1", "8", "0.5", "micro-batches of 8 rows"],
        ["update skipped", "2", "24", "1.5", "batch of 8"],
        ["resumed", "2", "24", "1.5", "from step-00000002"],
        ["workers change", "2", "24", "1.5", "1 → 2 workers"],
    ]


def test_tests_by_branches_are_listed_with_what_they_found_and_have_a_sign(tmp_path: Path) -> None:
    script = Script().stage(0, 8, 8).updates(1.0)
    limits = {"window": 16, "losses": [[1.0], [0.9]], "differences": [0.0, -0.125], "errors": [0.0, 0.05]}
    script.event(
        "branches", goes_by="training", batches=[8, 16], lrs=[0.1, 0.2], winner=1, batch=16, evaluations=16, **limits
    )
    script.stage(1, 16, 8).updates(1.0).end()
    row = ["branches compared", "1", "8", "0.5", "16 of 8 and 16 goes on (16: -0.125 ± 0.05)"]
    assert shown(script, tmp_path / "run", "Events") == [row]
    write([str(tmp_path / "run")], str(tmp_path / "out"))
    source = (tmp_path / "out/report.html").read_text()
    assert "branches compared" in source
    assert "▲" in source or "\\u25b2" in source


def test_the_plan_stands_beside_what_the_run_came_to(tmp_path: Path) -> None:
    script = short().event("probe", norm=0.2, sfo=64 + 100, sfo_probe=100).end()
    target = Target(epsilon=0.25, sfo=(40,), best_batch=4.0, best_sfo=32.0)
    forecast = Forecast(sfo=100, updates=7, last=2, batch=32)
    planned = Planned(forecasts=(forecast,), after={0: 16, 1: 64}, target=target)
    records = read([script.save(tmp_path / "run")])
    headed = Page(page(records, {}, [planned])).headed
    assert headed["Planned and actual"][1:] == [
        ["SFO of updates", "100", "64"],
        ["updates", "7", "5"],
        ["last stage", "2", "1"],
        ["largest batch", "32", "16"],
        ["SFO to ‖∇f‖ ≤ 0.25", "40", "≤ 64"],
        ["SFO at the best constant batch, 4.0", "32", "—"],
        ["times the best constant's", "1.25 ×", "2.00 ×"],
    ]
    assert [row[-2:] for row in headed["Stages"]] == [
        ["samples by then", "planned by then"],
        ["16", "16"],
        ["64", "64"],
    ]


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_names_what_it_wrote_and_ends_with_2_where_it_cannot(distgrow: Commands) -> None:
    short().save(distgrow.folder / "run")
    done = distgrow("report", "run", "--out", "shown")
    assert (done.code, done.err) == (0, "")
    assert done.out.split() == ["wrote", *(f"shown/{name}" for name in FILES)]
    assert all((distgrow.folder / "shown" / name).is_file() for name in FILES)
    failed = distgrow("report", "run", "typo")
    assert (failed.code, failed.out) == (2, "")
    assert failed.err == "distgrow: typo/config.yaml does not exist; name the run.dir of a run that has begun\n"


def test_matplotlib_is_loaded_only_for_a_report() -> None:
    check = "import sys, distgrow, distgrow.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
