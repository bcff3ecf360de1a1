"""Client of a Ray cluster's dashboard: versions, packages, applications. It does not need Ray on this machine."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from claude_hitl_template.cli.deploy.package import Package
from claude_hitl_template.config import network
from claude_hitl_template.config.secret_files import read_ray_token
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, HitlError, Unavailable
from claude_hitl_template.presentation.text import last_line

ASK_S = 30.0
UPLOAD_S = 600.0  # between two pieces: a slow line is no failure, a dead one is
ATTEMPTS = 3
POLL_S = 0.5
_NOT_FOUND = 404
_REFUSED = (401, 403)
REFUSED_FIX = (
    "on the cluster, ./hitl status --show-secrets shows it (of a Ray that was started by hand, ~/.ray/auth_token there "
    "holds it): set HITL_RAY_TOKEN in .env or the profile to it"
)

type Say = Callable[[str], None]


@dataclass(frozen=True)
class Versions:
    """Of what runs on the cluster; `python` with its patch level, None where the cluster does not say."""

    ray: str
    python: str | None


class Cluster:
    """Every method raises Unavailable if the dashboard does not answer, and ConfigError if another program answers or the
    token is refused."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        say: Say = lambda _: None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url, self._say = url, say
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = network.direct(base_url=url, timeout=ASK_S, headers=headers, transport=transport)

    @classmethod
    def open(cls, settings: Settings, *, say: Say = lambda _: None) -> "Cluster":
        """The cluster of these settings. Raises ConfigError if its token cannot be read."""
        return cls(settings.dashboard, token=read_ray_token(settings), say=say)

    def close(self) -> None:
        self._http.close()

    def versions(self) -> Versions:
        ray = self._json("/api/version").get("ray_version")
        if not isinstance(ray, str):
            raise self._foreign()
        metadata = self._json("/api/v0/cluster_metadata").get("data")
        python = metadata.get("pythonVersion") if isinstance(metadata, dict) else None
        return Versions(ray, python if isinstance(python, str) else None)

    def asks_for_token(self) -> bool | None:
        """Whether Ray requires its token; None if unknown."""
        with self._reachable():
            answer = self._http.get("/api/authentication_mode")
        mode = _dictionary(answer).get("authentication_mode")
        return mode == "token" if isinstance(mode, str) else None

    def serve(self) -> dict[str, Any]:
        """Serve's state: `applications` by name, `http_options`; neither while it does not run."""
        return self._json("/api/serve/applications/")

    def put_serve(self, config: dict[str, Any]) -> None:
        """Applies a config of Serve. Raises ConfigError when it is refused."""
        answer = self._ask("PUT", "/api/serve/applications/", json=config)
        if not answer.is_success:
            raise ConfigError(
                f"Serve refuses the config: {answer.text[-500:]}", "see ./hitl logs on the cluster"
            )

    def upload(self, package: Package) -> bool:
        """Uploads the package unless the cluster has it; returns whether it was uploaded. A broken upload is repeated."""
        # Asking also pins it for ten minutes, so that it is there until Serve holds it.
        if self._has(package.name):
            return False
        retrying = Retrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.5, max=5),
            before_sleep=self._tell,
            reraise=True,
        )
        retrying(self._put, package)
        return True

    def _put(self, package: Package) -> None:
        """Uploads the package. Ray stores it only if it is complete."""
        timeout = httpx.Timeout(ASK_S, write=UPLOAD_S, read=UPLOAD_S)
        path = f"/api/packages/gcs/{package.name}"
        lost = "the connection was lost during the upload"
        answer = self._ask("PUT", path, lost, content=package.content, timeout=timeout)
        if not answer.is_success:
            why = last_line(answer.text) or "it does not say why"
            raise ConfigError(
                f"the cluster does not take the package ({answer.status_code}): {why}",
                "read dashboard*.log in Ray's folder on the cluster (session_latest/logs)",
            )
        if not self._has(package.name):
            raise Unavailable("the cluster took the package and does not have it")

    def _has(self, name: str) -> bool:
        answer = self._ask("GET", f"/api/packages/gcs/{name}")
        if answer.status_code != _NOT_FOUND and not answer.is_success:
            raise ConfigError(
                f"the cluster's package store fails: {last_line(answer.text) or 'it does not say why'}",
                "restart Ray on the cluster",
            )
        return answer.is_success

    def _json(self, path: str) -> dict[str, Any]:
        answer = self._ask("GET", path)
        found = _dictionary(answer)
        if not found:
            raise self._foreign(f" ({path}: {answer.status_code})")
        return found

    def _ask(
        self, method: str, path: str, lost: str = "Ray's dashboard does not answer", **options: Any
    ) -> httpx.Response:
        with self._reachable(lost):
            answer = self._http.request(method, path, **options)
        if answer.status_code in _REFUSED:
            had = "authorization" in self._http.headers
            what = "refuses this machine's token" if had else "requires a token, and this machine has none"
            raise ConfigError(f"Ray's dashboard at {self.url} {what}", REFUSED_FIX)
        return answer

    def _foreign(self, detail: str = "") -> ConfigError:
        return ConfigError(
            f"what answers at {self.url} is not Ray's dashboard{detail}",
            "correct HITL_DASHBOARD_URL, or the profile",
        )

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._say(
            f"{str(error).splitlines()[0]}; trying again (attempt {state.attempt_number + 1} of {ATTEMPTS})"
        )

    @contextmanager
    def _reachable(self, what: str = "Ray's dashboard does not answer") -> Generator[None]:
        try:
            yield
        except (httpx.TransportError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise Unavailable(
                f"{what} at {self.url} ({why})\n"
                "  Fix: is the VM, or the tunnel, up, and Ray in it? Start them, or correct HITL_DASHBOARD_URL, or name a "
                "profile with --profile"
            ) from error


def asks_for_token(settings: Settings) -> bool | None:
    """Whether the Ray of these settings requires its token; None if unknown."""
    cluster = Cluster(settings.dashboard)
    try:
        return cluster.asks_for_token()
    except HitlError:
        return None
    finally:
        cluster.close()


def _dictionary(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object that an answer holds; {} where it is none."""
    try:
        found = answer.json() if answer.is_success else None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def wait_for[T](poll: Callable[[], T | None], limit_s: float) -> T | None:
    """The first result of `poll` that is not None; None after the limit."""
    deadline = time.monotonic() + limit_s
    while (found := poll()) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found
