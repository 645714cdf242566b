"""Serves the live page of running jobs over HTTP; writes nothing, knows no training."""

import errno
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from distgrow.core.errors import ConfigError
from distgrow.report.page import frame
from distgrow.report.planned import Foresee
from distgrow.report.view import View, digest
from distgrow.run.folder import RunFolder

_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'"
)


def serve(runs: Sequence[str], host: str, port: int, foresee: Foresee, update_s: float | None) -> None:
    """Show the runs at http://host:port/ until Ctrl-C; port 0 is any free one.

    Raises:
        ConfigError: it cannot listen there.
    """
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
    """Return whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(ThreadingHTTPServer):
    """Serve one view."""

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
    """Answer GET of the page, its content and its plots."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        """Send the page at /, its content at /content (304 if the reader has it), pictures by their file names."""
        path = urlsplit(self.path).path
        if self._rebound():
            self.send_error(403, "ask for it by this machine's own address")
        elif path == "/":
            self._answer("text/html; charset=utf-8", self._page().encode(errors="replace"))
        elif path == "/content":
            text = self.server.view.content()
            self._answer("text/html; charset=utf-8", text.encode(errors="replace"), tag=f'"{digest(text)}"')
        elif picture := self.server.view.picture(path[1:]):
            self._answer("image/png", picture, cache="max-age=3600")
        else:
            self.send_error(404)

    def _rebound(self) -> bool:
        """Return whether a page of elsewhere asks through the reader's browser, by its own name for this machine."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        except ValueError:  # no name at all, as "["
            host = ""
        return local(str(self.server.server_address[0])) and not local(host)

    def _page(self) -> str:
        return frame(self.server.view.names, None)

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
