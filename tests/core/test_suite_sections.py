"""The suite of benchmarks: tables are replaced, prose stays, and what fails is seen and stops nobody else."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite
from suite_sections import STALE, Run, finished, section_of, source, stale

FIGURES = (
    "print('[INFO] a library'); "
    "print('Hardware: an abacus.'); print(); print('**T**'); print(); print('| a |'); print('| --- |'); print('| 7 |')"
)
README = """# Figures

Before.

<!-- good: generated -->
| a |
| --- |
| 1 |
<!-- good: end -->

Between.

<!-- bad: generated -->
`python bad.py` · commit 123 · 2020-02-02

| b |
| --- |
| 2 |
<!-- bad: end -->

After.
"""


def benchmark(root: Path, name: str, code: str, **settings: object) -> suite.Benchmark:
    """One whose script is `code`."""
    (root / f"{name}.py").write_text(code)
    return suite.Benchmark(**{"name": name, "script": f"{name}.py", "quick": (), **settings})  # pyright: ignore


def begun(root: Path) -> suite.Suite:
    """A suite that writes into a README in a folder."""
    (root / "README.md").write_text(README)
    return suite.Suite(into=root / "README.md", logs=root / "logs", quick=False, root=root)


def outside(path: Path) -> str:
    """What is not in the sections `good` and `bad`."""
    text = path.read_text()
    for name in ("good", "bad"):
        text = text.replace(section_of(path, name) or "", "")
    return text


def test_a_failure_marks_its_old_table_and_stops_nobody_else(tmp_path: Path) -> None:
    runs = begun(tmp_path)
    prose = outside(runs.into)
    bad = benchmark(tmp_path, "bad", "raise SystemExit('the | disk is full')")
    failures = runs.run([bad, benchmark(tmp_path, "good", FIGURES)])
    assert failures == ["bad: exit code 1: the | disk is full"]
    good, bad_section = section_of(runs.into, "good"), section_of(runs.into, "bad")
    assert good is not None and "| 7 |" in good and "| 1 |" not in good and STALE not in good and "INFO" not in good
    assert good.startswith("`python good.py` · ") and good.splitlines()[0].endswith(" · an abacus")
    assert bad_section is not None and "| 2 |" in bad_section and "commit 123 · 2020-02-02" in bad_section
    assert bad_section.startswith(STALE) and "exit code 1: the | disk is full" in bad_section
    assert outside(runs.into) == prose


def test_only_the_latest_failure_is_told_and_a_success_ends_it(tmp_path: Path) -> None:
    runs = begun(tmp_path)
    for reason in ("first", "second"):
        runs.run([benchmark(tmp_path, "bad", f"raise SystemExit('{reason}')")])
    text = runs.into.read_text()
    assert text.count(STALE) == 1 and "first" not in text and "second" in text and "| 2 |" in text
    assert runs.run([benchmark(tmp_path, "bad", FIGURES)]) == []
    assert STALE not in runs.into.read_text() and "| 7 |" in (section_of(runs.into, "bad") or "")


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    runs = begun(tmp_path)
    starts = "import subprocess as s, sys; p = s.Popen([sys.executable, '-c', 'import time; time.sleep(90)'])"
    code = f"{starts}; open('child', 'w').write(str(p.pid)); p.wait()"
    assert runs.run([benchmark(tmp_path, "bad", code, limit_s=3)]) == ["bad: it took longer than 3 s"]
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(200):  # one that has been killed takes a moment to go
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what it started is still there")


def test_what_is_not_there_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = begun(tmp_path)
    missing = suite.Benchmark(name="peers", script="peers.py")
    needy = benchmark(tmp_path, "bad", FIGURES, needs="data/images")
    assert runs.run([missing, needy]) == []
    assert "peers: left out: there is no peers.py" in capsys.readouterr().err
    assert "left it out: there is no peers.py" in (section_of(runs.into, "peers") or "")
    kept = section_of(runs.into, "bad") or ""
    assert kept.startswith(STALE) and "there is no data/images" in kept and "| 2 |" in kept


def test_a_benchmark_must_print_a_table_to_have_its_old_one_replaced(tmp_path: Path) -> None:
    runs = begun(tmp_path)
    assert runs.run([benchmark(tmp_path, "bad", "print('nothing to tell')")]) == [
        "bad: it ended well but has printed no table"
    ]
    kept = section_of(runs.into, "bad") or ""
    assert kept.startswith(STALE) and "| 2 |" in kept


def test_a_benchmark_that_writes_its_section_itself_must_have_done_so(tmp_path: Path) -> None:
    runs = begun(tmp_path)
    writes = "import sys, pathlib; p = pathlib.Path(sys.argv[-1]); t = p.read_text(); i = t.index('`python bad.py`'); "
    writes += "j = t.index('<!-- bad: end'); p.write_text(t[:i] + 'new figures\\n' + t[j:])"
    assert runs.run([benchmark(tmp_path, "bad", writes, writes_itself=True)]) == []
    assert section_of(runs.into, "bad") == "new figures"
    assert runs.run([benchmark(tmp_path, "bad", "", writes_itself=True)]) == [
        "bad: it ended well but has written nothing"
    ]
    assert "new figures" in (section_of(runs.into, "bad") or "")


def test_the_commit_says_whether_what_was_measured_was_changed(tmp_path: Path) -> None:
    assert source(tmp_path) == "unknown commit"
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    (tmp_path / "benchmarks").mkdir()
    for file in ("code.py", "benchmarks/README.md"):
        (tmp_path / file).write_text("1")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = source(tmp_path)
    (tmp_path / "benchmarks/README.md").write_text("2")
    assert source(tmp_path) == clean and not clean.endswith("+")
    (tmp_path / "code.py").write_text("2")
    assert source(tmp_path) == f"{clean}+"


def test_sections_that_are_not_there_yet_come_at_the_end(tmp_path: Path) -> None:
    path, run = tmp_path / "README.md", Run(command="python x.py", commit="commit 1")
    path.write_text(README)
    stale(path, "new", "failed: a reason", run)
    finished(path, "newer", run, "| 3 |", [("a plot", "plots/p.png")])
    assert path.read_text().startswith(README.strip())
    assert "No figures yet." in (section_of(path, "new") or "")
    assert (section_of(path, "newer") or "").endswith("| 3 |\n\n![a plot](plots/p.png)")


def test_every_section_of_the_suite_is_in_the_readme() -> None:
    names = [entry.name for entry in suite.SUITE]
    assert len(set(names)) == len(names)
    absent = [name for name in names if section_of(suite.README, name) is None]
    assert set(absent) <= {"peers"}


def test_quick_numbers_stay_out_of_the_readme(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite.py", "--quick", "--into", str(suite.README)])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2 and "quick numbers mean nothing" in capsys.readouterr().err
