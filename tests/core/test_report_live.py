"""The live view: what it shows of runs that begin, grow, tear, break and end, and how its server starts and stops."""

import json
import re
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Commands
from scripted import Script, short

from distgrow.report.live import Server, local
from distgrow.report.view import View


def view(*runs: Path) -> View:
    """A view without plans."""
    return View([str(run) for run in runs], lambda _: None)


def updates(content: str) -> list[str]:
    """The number of updates of each run."""
    head, rows = re.findall(r"<thead>(.*?)</thead><tbody>(.*?)</tbody>", content, re.DOTALL)[0]
    place = re.findall(r"<th>(.*?)</th>", head).index("updates")
    return [re.findall(r"<td>(.*?)</td>", row)[place] for row in rows.strip().splitlines()]


def drawn(of: View) -> str:
    """The content once its plots are drawn."""
    until = time.monotonic() + 60
    while "drawing" in (content := of.content()):
        assert time.monotonic() < until, "no plots came"
        time.sleep(0.05)
    return content


def test_a_run_is_waited_for_until_its_first_update(tmp_path: Path) -> None:
    run = tmp_path / "<run>"
    shown = view(run)
    name = "&lt;run&gt;"
    assert f"waiting for the first update of {name}: {tmp_path}/{name}/metrics.jsonl does not exist" in shown.content()
    Script().event("start").stage(0, 8, 8).save(run)
    assert f"{name}/metrics.jsonl holds none yet" in shown.content()
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in short().events))
    content = shown.content()
    assert "waiting" not in content
    assert updates(content) == ["5"]


def test_what_is_written_is_shown_at_once_and_a_torn_line_once_it_is_whole(tmp_path: Path) -> None:
    lines = [json.dumps(event) + "\n" for event in short().events]
    run = Path(Script().save(tmp_path / "run"))
    shown = view(run)
    with (run / "metrics.jsonl").open("a") as file:
        for count, line in enumerate(lines, start=1):
            file.write(line[:20])
            file.flush()
            shown.content()
            file.write(line[20:])
            file.flush()
            steps = sum('"event": "step"' in before for before in lines[:count])
            assert (updates(shown.content()) == [str(steps)]) if steps else ("waiting" in shown.content())
    assert "<td>done</td>" in shown.content()


def test_a_damaged_line_is_shown_until_it_is_repaired(tmp_path: Path) -> None:
    run = Path(short().save(tmp_path / "run"))
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + "<oops>\n")
    shown = view(run)
    assert ":11 is damaged: the line &#39;&lt;oops&gt;&#39; is not JSON" in shown.content()
    (run / "metrics.jsonl").write_text(good)
    assert updates(shown.content()) == ["5"]


@contextmanager
def served(shown: View) -> Iterator[str]:
    """The address of a server in this process."""
    server = Server("127.0.0.1", 0, shown)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(address: str, **headers: str) -> tuple[int, str | None, bytes]:
    """Status, ETag and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status, answer.headers["ETag"], answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["ETag"], error.read()


def test_the_content_is_sent_again_only_where_it_has_changed(tmp_path: Path) -> None:
    run = Path(short().save(tmp_path / "run"))
    shown = view(run)
    with served(shown) as address:
        assert drawn(shown) is shown.content()  # nor made again
        status, tag, body = get(f"{address}/content")
        assert (status, updates(body.decode())) == (200, ["5"])
        assert tag is not None
        assert get(f"{address}/content", **{"If-None-Match": tag}) == (304, tag, b"")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**short().events[-1], "step": 6}) + "\n")
        status, other, body = get(f"{address}/content", **{"If-None-Match": tag})
        assert (status, updates(body.decode())) == (200, ["6"])
        assert other != tag


def test_the_page_and_the_plots_that_the_content_names_are_served_and_nothing_else(tmp_path: Path) -> None:
    shown = view(Path(short().save(tmp_path / "run")))
    with served(shown) as address:
        assert b"<title>distgrow report: run</title>" in get(address)[2]
        sources = re.findall(r'src="([^"]+)"', drawn(shown))
        assert [source.split("?")[0] for source in sources] == [
            f"{axis}-{panel}.png" for axis in ("sfo", "step", "time_s") for panel in range(6)
        ]
        assert all(get(f"{address}/{source}")[2].startswith(b"\x89PNG") for source in sources)
        others = ("config.yaml", "metrics.jsonl", "../run/config.yaml", "content/", "sfo-0.png/")
        assert [get(f"{address}/{other}")[0] for other in others] == [404] * 5


def test_a_local_view_answers_nobody_who_calls_this_machine_by_a_name_of_their_own(tmp_path: Path) -> None:
    with served(view(Path(short().save(tmp_path / "run")))) as address:
        port = address.rpartition(":")[2]
        foreign = ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[")
        assert [get(f"{address}/content", Host=host)[0] for host in foreign] == [403] * 4
        assert [get(f"{address}/content", Host=host)[0] for host in (f"localhost:{port}", f"[::1]:{port}")] == [200] * 2


def test_a_reader_that_goes_away_in_the_middle_of_an_answer_is_not_told_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = view(Path(short().save(tmp_path / "run")))
    with served(shown) as address:
        drawn(shown)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as reader:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
                reader.sendall(b"GET /sfo-0.png HTTP/1.0\r\n\r\n")
        assert get(address)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)],
)
def test_only_loopback_addresses_are_of_this_machine_alone(host: str, alone: bool) -> None:
    assert local(host) == alone


@pytest.mark.parametrize(("host", "warned"), [((), False), (("--host", "0.0.0.0"), True)])
def test_the_command_prints_its_address_and_ends_with_0_at_ctrl_c(
    distgrow: Commands, host: tuple[str, ...], warned: bool
) -> None:
    process = distgrow.start("report", "--serve", "run", "--port", "0", *host)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"showing run at (http://[\d.]+:(\d+)/) until Ctrl-C\n", line)
        assert found, line
        assert b"distgrow report: run" in get(f"http://127.0.0.1:{found[2]}/")[2]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (0, "")
    told = "warning: --host=0.0.0.0 shows these runs and their configs to everybody who can reach this machine\n"
    assert err == (told if warned else "") + "run does not exist yet: it is waited for\n"


def test_an_address_that_cannot_be_had_ends_with_2_and_the_way_out(distgrow: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        failed = distgrow("report", "--serve", "run", "--port", str(port))
    assert (failed.code, failed.out) == (2, "")
    assert failed.err == f"distgrow: --port={port} is taken on 127.0.0.1; choose another, or --port 0 for any\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--serve", "--out", "x"), "--out=x: --serve writes no files; leave one of the two out"),
        (("--port", "80"), "--host and --port are for --serve; give that too, or leave them out"),
        (("--update-s", "0"), "--update-s=0 must be a number of seconds above 0"),
        (("--serve", "--host", "192.0.2.1"), "--host=192.0.2.1 cannot be listened on: .*; name an address of this"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from distgrow.cli import app

    failed = CliRunner().invoke(app, ["report", "run", *words])
    assert re.match(told, str(failed.exception)), failed.exception
