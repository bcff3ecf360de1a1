"""`hitl doctor --remote`: checks the cluster from the development machine, at the addresses that its commands use."""

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import httpx

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import said_to_a_key
from claude_hitl_template.cli.deploy.cluster import Cluster
from claude_hitl_template.cli.deploy.serve_config import OURS
from claude_hitl_template.config import network
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.config.secret_files import read_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, HitlError
from claude_hitl_template.presentation.checks import Check

ASK_S = 10.0
# The HTTP date has whole seconds, and the answer takes a while.
SKEW_S = 5.0
OPEN = "Ray requires none: anyone who reaches its ports can run code there"
OPEN_FIX = (
    "start it with ./hitl up; or, by hand, with RAY_AUTH_MODE=token, and set HITL_RAY_TOKEN here to what `ray "
    "get-auth-token --generate` prints there"
)
_START = "start the VM, or the tunnel, and ./hitl up there; or correct {} in .env or the profile"


def examine(settings: Settings, patience_s: float = ASK_S) -> Iterator[Check]:
    """Every check, in the order in which problems are best fixed."""
    yield from _dashboard_checks(settings)
    yield ray_client_check(settings.ray_client, patience_s)
    yield from _service_checks(settings)
    if settings.panel:
        yield panel_check(settings.panel_at)


def _dashboard_checks(settings: Settings) -> Iterator[Check]:
    cluster = Cluster.open(settings)
    try:
        asks = cluster.asks_for_token()
        found = cluster.versions()
        yield Check("dashboard", "ok", f"{settings.dashboard} answers")
        yield from token_checks(asks)
        yield version_check("Ray", version("ray"), found.ray)
        yield version_check("Python", python_minor(), _minor(found.python))
        yield skew_check(*_clocks(settings.dashboard))
        yield application_check(cluster.serve().get("applications", {}).get(OURS))
    except ConfigError as error:
        yield Check("dashboard", "wrong", error.message, error.fix)
    except (HitlError, httpx.HTTPError) as error:
        yield Check("dashboard", "wrong", str(error).splitlines()[0], _START.format("HITL_DASHBOARD_URL"))
    finally:
        cluster.close()


def token_checks(asks: bool | None) -> Iterator[Check]:
    """`asks`: whether Ray requires its token; no check if that is unknown."""
    if asks:
        yield Check("Ray's token", "ok", "Ray requires it")
    elif asks is not None:
        yield Check("Ray's token", "wrong", OPEN, OPEN_FIX)


def version_check(name: str, here: str, there: str | None) -> Check:
    """Ray needs the same Ray version on both sides, and for pickles the same Python."""
    if there is None:
        return Check(name, "warning", f"{here} here; the cluster does not say", "compare them by hand")
    if here == there:
        return Check(name, "ok", f"{here} here and there")
    fix = f"on the cluster: install {name} {here}, ./hitl down, ./hitl up; or make .venv here with {there}"
    return Check(name, "wrong", f"{here} here, {there} on the cluster", fix)


def skew_check(here: float, there: float | None) -> Check:
    """`here`, `there`: both clocks at the same time, in seconds."""
    if there is None:
        return Check("clocks", "warning", "the cluster does not tell its time", "compare `date -u` on both")
    behind = round(here - there)
    if abs(behind) <= SKEW_S:
        return Check("clocks", "ok", "the same on both")
    found = f"the cluster's is {abs(behind)} s {'behind' if behind > 0 else 'ahead of'} this one's"
    return Check("clocks", "warning", found, "on both: timedatectl set-ntp true; a VM that slept: restart it")


def application_check(found: dict[str, Any] | None) -> Check:
    """Checks our application's status in Serve; None if Serve has none of that name."""
    if found is None:
        return Check("application", "wrong", "none is deployed", "./hitl deploy")
    status = str(found.get("status"))
    if status == "RUNNING":
        return Check("application", "ok", status)
    message = " ".join(str(found.get("message", "")).split())[-300:]
    level = "warning" if status == "DEPLOYING" else "wrong"
    return Check("application", level, f"{status}: {message}", "correct that, then ./hitl deploy")


def ray_client_check(address: str, patience_s: float) -> Check:
    """Whether Ray Client answers at the address: a forwarded port accepts connections even without a target."""
    import grpc  # noqa: PLC0415  (slow to import)

    direct = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(urlsplit(address).netloc, options=direct) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=patience_s)
        except grpc.FutureTimeoutError:
            found = f"{address} does not answer"
            return Check("Ray Client", "wrong", found, _START.format("HITL_RAY_ADDRESS"))
    return Check("Ray Client", "ok", f"{address} answers")


def _service_checks(settings: Settings) -> Iterator[Check]:
    url = settings.service_url
    try:
        answer = network.request("GET", f"{url}/v1/health", timeout=ASK_S)
        more = said_to_a_key(url, settings) if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError) as error:
        why = str(error) or type(error).__name__
        yield Check("service", "wrong", f"{url} does not answer: {why}", _START.format("HITL_SERVE_URL"))
        return
    yield health_check(url, answer.status_code, {**_json(answer), **more}, code_version())
    if answer.status_code == 200:
        yield key_check(settings)


def health_check(url: str, status: int, facts: dict[str, Any], code: str) -> Check:
    """Compares the service's version with the code of this working tree."""
    if status != 200:
        fix = "./hitl deploy; where that fails, it says why"
        return Check("service", "wrong", f"{url} answers {status}: no application is healthy there", fix)
    commit = str(facts.get("commit") or "")[:12]
    shown = f"code {facts.get('code')}{f', commit {commit}' if commit else ''}"
    if facts.get("code") == code:
        return Check("service", "ok", f"healthy, {shown}: this working tree's")
    return Check(
        "service", "warning", f"healthy, but {shown}, and the working tree is {code}", "./hitl deploy"
    )


def key_check(settings: Settings) -> Check:
    """The API key that commands on this machine use is one of the cluster's."""
    fix = "on the cluster, ./hitl status --show-secrets shows the key: set HITL_API_KEY in .env or the profile to it"
    try:
        key = settings.api_key.get_secret_value() if settings.api_key else read_api_key(settings)
    except ConfigError:
        return Check("API key", "warning", "none here", fix)
    try:
        url, headers = f"{settings.service_url}/v1/sessions?limit=1", {"x-api-key": key}
        status = network.request("GET", url, headers=headers, timeout=ASK_S).status_code
    except UnicodeEncodeError:
        return Check("API key", "wrong", "it holds characters that are not ASCII", fix)
    except httpx.HTTPError as error:
        return Check("API key", "wrong", f"not checked: {error}", "try again")
    if status == 401:
        return Check("API key", "wrong", "the service refuses it", fix)
    return Check("API key", "ok", "the service takes it")


def panel_check(url: str) -> Check:
    try:
        status = network.request("GET", url, timeout=ASK_S).status_code
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        return Check("panel", "wrong", f"{url} does not answer: {why}", _START.format("HITL_PANEL_PORT"))
    return Check("panel", "ok", f"{url} answers ({status})")


def _clocks(url: str) -> tuple[float, float | None]:
    before = time.time()
    date = network.request("HEAD", url, timeout=ASK_S).headers.get("date")
    here = (before + time.time()) / 2
    try:
        return here, parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:
        return here, None


def _minor(full: str | None) -> str | None:
    return ".".join(full.split(".")[:2]) if full else None


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
