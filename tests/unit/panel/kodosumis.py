"""Kodosumi's real panel behind our checks, without the Ray that it would start by connecting to."""

import gc
import http.client
import json
import uuid
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jose import jwt
from kodosumi.config import InternalSettings

from claude_hitl_template.domain.rate_limit import Throttle
from tests.serving import loopback

with warnings.catch_warnings(action="ignore"):  # of what it imports
    from kodosumi.service.app import create_app, shutdown, startup
    from kodosumi.service.jwt import encode_jwt_token

    from claude_hitl_template.panel import server

PASSWORD = "password-of-the-admin"
NAMES = ("admin", "user", "other")
HOST = "panel.test:3370"  # by which the panel is reached, wherever it listens
URL = f"http://{HOST}"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class RealPanel:
    """A panel at `address` with one user of each role; `logins` has each role's name."""

    address: str
    folder: Path
    settings: InternalSettings
    clock: Clock
    logins: dict[str, str]

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        role: str | None = None,
        headers: Mapping[str, str | None] | None = None,
        content_type: str | None = "application/json",
        source: str = "127.0.0.1",
    ) -> Answer:
        """Sends one request like a page of the panel, with `path` unchanged; a header that is None is left out."""
        sent: dict[str, str | None] = {"Host": HOST, "Origin": URL}
        if role is not None:
            sent["Cookie"] = f"kodosumi_jwt={self.logins[role]}"
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent |= {"Content-Type": content_type, "Content-Length": str(len(data))}
        sent |= headers or {}
        host, _, port = self.address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30, source_address=(source, 0))
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(data)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def log_in(self, name: str, password: str, **more: Any) -> Answer:
        return self.ask("POST", "/api/login", {"name": name, "password": password}, **more)

    def role(self, name: str) -> dict[str, Any]:
        """Returns the panel's description of a role, as an operator sees it."""
        return self.ask("GET", f"/role/{name}", role="admin").json()

    def is_operator(self, name: str) -> bool:
        login = self.logins[name]
        return self.ask("GET", "/role", headers={"KODOSUMI_API_KEY": login}).status == 200

    def id_of(self, name: str) -> str:
        return jwt.get_unverified_claims(self.logins[name])["sub"]

    def flow_of(self, name: str, kind: str = "out") -> tuple[str, Path]:
        """Creates a flow of that role; returns its id and its folder of files."""
        flow = uuid.uuid4().hex
        folder = Path(self.settings.EXEC_DIR) / self.id_of(name) / flow / kind
        folder.mkdir(parents=True)
        return flow, folder


@contextmanager
def real_panel(folder: Path, monkeypatch: Any) -> Generator[RealPanel]:
    clock = Clock()
    settings = InternalSettings(
        ADMIN_DATABASE=f"sqlite+aiosqlite:///{folder / 'admin.db'}",
        ADMIN_PASSWORD=PASSWORD,
        EXEC_DIR=str(folder / "execution"),
        UPLOAD_DIR=str(folder / "uploads"),
        APP_LOG_FILE=str(folder / "panel.log"),
        APP_STD_LEVEL="CRITICAL",
        YAML_BASE=str(folder / "config" / "config.yaml"),
        CORS_ORIGINS=[URL],
    )

    def without_ray(**options: Any) -> Any:
        with warnings.catch_warnings(action="ignore"):
            app = create_app(**options)
        app.on_startup.remove(startup)
        app.on_shutdown.remove(shutdown)
        return app

    monkeypatch.setattr(server, "create_app", without_ray)
    with loopback(server.build(settings, Throttle(10, 300.0, clock=clock))) as address:
        panel = RealPanel(address.removeprefix("http://"), folder, settings, clock, {})
        panel.logins["admin"] = panel.log_in("admin", PASSWORD).json()["KODOSUMI_API_KEY"]
        for name in NAMES[1:]:
            made = {"name": name, "email": f"{name}@example.com", "password": f"password-of-{name}"}
            role = panel.ask("POST", "/role", made, role="admin").json()
            panel.logins[name] = encode_jwt_token(role["id"])
        yield panel
    gc.collect()  # connections that Kodosumi leaves open, while their warnings are ignored
