"""The live view: a page of running jobs over HTTP that follows what they write; writes nothing, knows no training."""

import errno
import hashlib
import ipaddress
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from distgrow.core.errors import ConfigError
from distgrow.report.log import Log
from distgrow.report.page import Picture, content, frame
from distgrow.report.planned import Foresee, Planned
from distgrow.report.plots import paint
from distgrow.report.runs import Record, named, newest
from distgrow.run.folder import RunFolder

#: Share of the time that may go into drawing: the training may need the same processor.
DRAWING = 0.2
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'"
)


def serve(runs: Sequence[str], host: str, port: int, foresee: Foresee, update_s: float | None) -> None:
    """Show the runs at http://host:port/ until Ctrl-C; port 0 is any free one. ConfigError where it cannot listen."""
    server = _listen(host, port, View(runs, foresee, update_s))
    shown = f"[{host}]" if ":" in host else host
    if not local(host):
        warning = f"warning: --host={host} shows these runs and their configs to everybody who can reach this machine"
        print(warning, file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what they start behind them ignore it
    for folder in (RunFolder(run) for run in runs):
        if not folder.path.is_dir():
            print(f"{folder.path} does not exist yet: it is waited for", file=sys.stderr, flush=True)
    print(f"showing {', '.join(runs)} at http://{shown}:{server.server_address[1]}/ until Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def local(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(slots=True)
class Watched:
    """One run: how far it has been read, and its plan once that is known."""

    name: str
    folder: RunFolder
    log: Log
    plan: Planned | None = None


class View:
    """What is shown of runs that go on: figures as they are now, plots as often as DRAWING allows. Thread-safe."""

    def __init__(self, runs: Sequence[str], foresee: Foresee, update_s: float | None = None) -> None:
        self._watched = [Watched(name, folder, Log(folder.metrics)) for name, folder in named(runs).items()]
        self._foresee, self._update_s = foresee, update_s
        self._lock = threading.Lock()
        self._text, self._stale = "", True
        self._shown, self._drawn, self._due = list[Record](), list[Record](), 0.0
        self._plots, self._pictures = dict[str, bytes](), dict[str, Picture]()

    @property
    def names(self) -> list[str]:
        """Of the runs."""
        return [watched.name for watched in self._watched]

    def content(self) -> str:
        """The page's content as HTML, read on from where the last call came to."""
        with self._lock:
            try:
                self._text = self._now()
            except (ConfigError, OSError) as error:  # a run's files are at fault: the reader is told, and asks again
                self._stale = True
                self._text = f"<section><p>{escape(str(error))}</p></section>"
            return self._text

    def written(self) -> float | None:
        """Seconds since the epoch at which a run last wrote something; None where none has."""
        logs = [watched.folder.metrics for watched in self._watched]
        return max((log.stat().st_mtime for log in logs if log.is_file()), default=None)

    def plot(self, file: str) -> bytes | None:
        """The newest plot of that name."""
        with self._lock:
            return self._plots.get(file)

    def _now(self) -> str:
        changed = [watched.log.advance() for watched in self._watched]
        if any(changed):
            self._stale = True
            found = [newest(watched.name, watched.folder, watched.log) for watched in self._watched]
            self._shown = [record for record in found if record is not None]
        if not self._shown:
            return self._waiting()
        self._draw_if_due()
        if not self._stale:
            return self._text
        text = self._waiting() + content(self._shown, self._pictures, self._plans(), self._update_s)
        self._stale = False
        return text

    def _draw_if_due(self) -> None:
        if time.monotonic() >= self._due and self._drawn is not self._shown:
            self._drawn, self._due = self._shown, math.inf
            threading.Thread(target=self._draw, args=(self._shown,), daemon=True).start()

    def _draw(self, records: list[Record]) -> None:
        """New plots, in a thread of their own: the figures do not wait for them."""
        began = time.monotonic()
        try:
            plots = paint(records)
            pictures = {file: Picture.of(png) for file, png in plots.items()}
            pictures = {file: picture.at(f"{file}?{_digest(picture.source)}") for file, picture in pictures.items()}
            with self._lock:
                self._plots, self._pictures, self._stale = plots, pictures, True
        finally:
            now = time.monotonic()
            self._due = now + (now - began) * (1 / DRAWING - 1)

    def _plans(self) -> list[Planned | None]:
        shown = {record.name: record for record in self._shown}
        for watched in self._watched:
            if watched.plan is None and watched.name in shown:
                watched.plan = self._foresee(shown[watched.name])
        return [watched.plan for watched in self._watched if watched.name in shown]

    def _waiting(self) -> str:
        shown = {record.name for record in self._shown}
        waiting = [watched for watched in self._watched if watched.name not in shown]
        lines = [
            f"<p>waiting for the first update of {escape(watched.name)}: {escape(str(watched.folder.metrics))} "
            f"{'holds none yet' if watched.folder.metrics.is_file() else 'does not exist yet'}</p>"
            for watched in waiting
        ]
        return f"<section>{''.join(lines)}</section>" if lines else ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Server(ThreadingHTTPServer):
    """A server of one view."""

    daemon_threads = True

    def __init__(self, host: str, port: int, view: View) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.view = view
        super().__init__((host, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of readers that went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _listen(host: str, port: int, view: View) -> Server:
    try:
        return Server(host, port, view)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port={port} is taken on {host}; choose another, or --port 0 for any") from None
        if error.errno == errno.EACCES:
            raise ConfigError(f"--port={port} is not allowed to you; choose one from 1024 on") from None
        raise ConfigError(f"--host={host} cannot be listened on: {error}; name an address of this machine") from None


class Handler(BaseHTTPRequestHandler):
    """Answers GET of the page, its content and its plots."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """The page at /, its content at /content (304 where it is what the reader has), plots by their file names."""
        path = urlsplit(self.path).path
        if self._rebound():
            self.send_error(403, "ask for it by this machine's own address")
        elif path == "/":
            self._answer("text/html; charset=utf-8", self._page().encode(errors="replace"))
        elif path == "/content":
            text = self.server.view.content()
            self._answer("text/html; charset=utf-8", text.encode(errors="replace"), tag=f'"{_digest(text)}"')
        elif plot := self.server.view.plot(path[1:]):
            self._answer("image/png", plot, cache="max-age=3600")
        else:
            self.send_error(404)

    def _rebound(self) -> bool:
        """Whether a page of elsewhere asks through the reader's browser, by a name of its own for this machine."""
        try:
            asked = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        except ValueError:  # no name at all, as "["
            asked = ""
        return local(str(self.server.server_address[0])) and not local(asked)

    def _page(self) -> str:
        script = files("distgrow.report").joinpath("live.js").read_text(encoding="utf-8")
        body = '<p id="state" role="status">reading …</p><main id="content"></main>'
        return frame(self.server.view.names, f"{body}<script>\n{script}</script>")

    def _answer(self, kind: str, body: bytes, tag: str = "", cache: str = "no-store") -> None:
        known = bool(tag) and self.headers.get("If-None-Match") == tag
        self.send_response(304 if known else 200)
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", cache)
        if tag:
            self.send_header("ETag", tag)
            if (written := self.server.view.written()) is not None:
                self.send_header("Age", str(max(0, round(time.time() - written))))
        if not known:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not known:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a reader asks every second."""
