"""A proxy on loopback that records and refuses all requests, over HTTP and SOCKS 5."""

import socketserver
import threading
from collections.abc import Generator
from contextlib import contextmanager


class _Refusing(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        asked = self.request.recv(4096)
        if not asked:
            return
        self.server.asked.append(asked.split(b"\r\n")[0].decode(errors="replace"))  # type: ignore[attr-defined]
        if asked.startswith(b"\x05"):
            self.request.sendall(b"\x05\xff")  # none of the ways to log in is accepted
            return
        self.request.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Refusing)


@contextmanager
def refusing_proxy() -> Generator[tuple[int, list[str]]]:
    """Yields its port, and a list of the first line of each request so far."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], server.asked
        finally:
            server.shutdown()
            thread.join()
