"""`hitl deploy`: deploys this working tree to the cluster and reports whether it runs there."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from pydantic import SecretStr

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import Client, said_to_a_key
from claude_hitl_template.cli.common import say, step
from claude_hitl_template.cli.deploy import package, serve_config
from claude_hitl_template.cli.deploy.cluster import Cluster, Versions, wait_for
from claude_hitl_template.cli.deploy.package import Package
from claude_hitl_template.cli.deploy.serve_config import OURS, Files
from claude_hitl_template.cli.host.processes import names_secret
from claude_hitl_template.cli.program import ROOT, need_checkout
from claude_hitl_template.config import build_info, network
from claude_hitl_template.config.build_info import describe_origin
from claude_hitl_template.config.secret_files import RAY_TOKEN, read_ray_token, write_secret
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, HitlError, Unavailable
from claude_hitl_template.presentation.text import size

CONFIG = ROOT / "data" / "config"
KOCO_S = 120.0
RUNNING_S = 300.0
ANSWER_S = 30.0
REASON_LINES = 12
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")

Profile = Annotated[
    str | None,
    typer.Option("--profile", help="Settings of profiles/NAME.env; they win over .env.", metavar="NAME"),
]


class DeployFailed(HitlError):
    """The cluster did not accept the new code; the message has the reason and what runs now."""


def deploy(profile: Profile = None) -> None:
    """Uploads this working tree to the cluster and waits until Serve runs it."""
    need_checkout("deploy")
    settings = Settings.load(profile)
    secrets = secret_values(settings)
    files = serve_config.read(CONFIG)
    variables = serve_config.travelling(settings)
    serve_config.check_no_secret(files, secrets)
    built = package.build(ROOT, data_dir=settings.data_dir, secrets=secrets)
    for path in built.left_out:
        say(f"left out, as a secret or data: {path}")
    with _cluster(settings) as cluster:
        check_versions(cluster.versions())
        before = cluster.serve()
        check_applications(before, files)
        _upload(cluster, built)
        http = _http(before, settings)
        ours = {**variables, "HITL_SERVE_PORT": str(http["port"])}
        completed = serve_config.complete(files, uri=built.uri, variables=ours, http=http)
        with step(f"Deploying {describe_origin(built.origin.facts())}"):
            _apply(cluster, settings, completed, built, before)
    _report(settings, built)


def secret_values(settings: Settings) -> list[str]:
    """The values of secret settings."""
    found = [getattr(settings, name) for name in Settings.model_fields]
    return [value.get_secret_value() for value in found if isinstance(value, SecretStr)]


def check_versions(found: Versions) -> None:
    """Raises ConfigError that names the side to change: Ray's version must be equal, and Python's minor version."""
    ours = version("ray")
    if found.ray != ours:
        raise ConfigError(
            f"the cluster runs Ray {found.ray}, and this checkout is locked to {ours}; nothing was uploaded",
            f"on the cluster: pip install 'ray[serve,client]=={ours}' and restart Ray; or here: check out the code that was "
            f"locked to {found.ray}",
        )
    minor = build_info.python_minor()
    if found.python and ".".join(found.python.split(".")[:2]) != minor:
        raise ConfigError(
            f"the cluster runs Python {found.python}, and here it is {minor}; nothing was uploaded",
            f"on the cluster: start Ray with Python {minor}; or here: delete .venv and make it with the cluster's",
        )


def check_applications(serve: Mapping[str, Any], files: Files) -> None:
    """Raises ConfigError for applications that koco would delete: Serve removes those that its config does not name."""
    named = {document["name"] for document in files.values() if "name" in document}
    lost = [
        name
        for name, app in serve.get("applications", {}).items()
        if app.get("source") == "declarative" and app.get("status") != "DELETING" and name not in named
    ]
    if lost:
        raise ConfigError(
            f"the deploy would delete what else runs on the cluster: {', '.join(lost)}",
            f"put the YAML of each into {CONFIG}, or take it down first",
        )


def reason(message: str) -> str:
    """The last lines of Serve's message about a failure, which hold the error."""
    lines = [line.rstrip() for line in message.replace("\\n", "\n").splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-REASON_LINES:]) or "  Serve gives no reason"


@contextmanager
def _cluster(settings: Settings) -> Generator[Cluster]:
    cluster = Cluster.open(settings, say=say)
    try:
        yield cluster
    finally:
        cluster.close()


def _upload(cluster: Cluster, built: Package) -> None:
    with step(f"Uploading {built.files} files, {size(len(built.content))}"):
        new = cluster.upload(built)
    if not new:
        say(f"the cluster has package {built.origin.package} already")


def _http(serve: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Serve keeps the address that it was started with, and the code must know it."""
    running = serve.get("http_options") or {}
    if running.get("port"):
        return {"host": running.get("host", settings.host), "port": running["port"]}
    return {"host": settings.host, "port": settings.serve_port}


def _apply(
    cluster: Cluster, settings: Settings, files: Files, built: Package, before: Mapping[str, Any]
) -> None:
    """Raises DeployFailed once the cluster is as it was before, or says that it could not be brought there."""
    _koco(settings, serve_config.write(files, settings.data_dir / "deploy" / "config"))
    why = wait_for(lambda: _outcome_now(cluster, built.uri), RUNNING_S)
    if why == "":
        return
    why = why or f"  it is not up after {RUNNING_S:.0f} s: {_status(cluster.serve())}"
    raise DeployFailed(f"the new code does not run:\n{why}\n{_undo(cluster, before)}")


def _outcome_now(cluster: Cluster, uri: str | None) -> str | None:
    with suppress(Unavailable):  # Serve works on by itself
        return outcome(cluster.serve(), uri)
    return None


def outcome(serve: Mapping[str, Any], uri: str | None) -> str | None:
    """Empty once our application runs from the package (None: from its code on the cluster); the reason
    when it failed; None while neither is known."""
    app = serve.get("applications", {}).get(OURS)
    if app is None or _package_of(app) != uri:
        return None
    if app["status"] == "RUNNING":
        return ""
    if app["status"] in _FAILED:
        messages = [
            app.get("message", ""),
            *(d.get("message", "") for d in app.get("deployments", {}).values()),
        ]
        return reason("\n".join(messages))
    return None


def working_dir(serve: Mapping[str, Any]) -> dict[str, str]:
    """The runtime environment with the code that the service runs; {} where it was not deployed as a package."""
    uri = _package_of(serve.get("applications", {}).get(OURS, {}))
    return {"working_dir": uri} if uri else {}


def _package_of(app: Mapping[str, Any]) -> str | None:
    config = app.get("deployed_app_config") or {}
    return (config.get("runtime_env") or {}).get("working_dir")


def _status(serve: Mapping[str, Any]) -> str:
    app = serve.get("applications", {}).get(OURS)
    return f"{app['status']} {app.get('message', '')}".strip() if app else "Serve does not know it"


def _undo(cluster: Cluster, before: Mapping[str, Any]) -> str:
    """Restores the previous deployment; returns what runs now."""
    apps = before.get("applications", {})
    declared = [app["deployed_app_config"] for app in apps.values() if app.get("deployed_app_config")]
    if OURS in apps and not apps[OURS].get("deployed_app_config"):
        return (
            "Serve keeps what ran before where the new code could not even be imported; ./hitl status tells.\n"
            "  Fix: correct the code and deploy again; or on the cluster: ./hitl down, then ./hitl up"
        )
    config = {"applications": declared}
    if before.get("proxy_location"):
        config |= {
            "proxy_location": before["proxy_location"],
            "http_options": before.get("http_options") or {},
        }
    try:
        cluster.put_serve(config)
        if OURS not in apps:
            return "nothing ran before, and nothing runs now.\n  Fix: correct the code, then deploy again"
        uri = _package_of(apps[OURS])
        back = wait_for(lambda: _outcome_now(cluster, uri), RUNNING_S)
    except HitlError as error:
        return f"what ran before could not be restored: {error}"
    if back == "":
        return "the previous code still runs.\n  Fix: correct the code, then deploy again"
    return f"what ran before was restored, and is not up yet: {back or 'Serve is still at it'}"


def _koco(settings: Settings, config: Path) -> None:
    """The real `koco deploy -r`. It ends with 0 when it failed, so what it says counts, and then what Serve says."""
    kept = network.without_proxies({n: v for n, v in os.environ.items() if not names_secret(n)})
    with tempfile.TemporaryDirectory() as leftovers:  # its copy of the config, and the folders that it makes
        own = {
            **_authentication(settings, Path(leftovers)),
            "RAY_DASHBOARD_ADDRESS": settings.dashboard,
            "TMPDIR": leftovers,
            "KODO_EXEC_DIR": leftovers,
            "PYTHON_DOTENV_DISABLED": "1",
        }
        try:
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-m", "kodosumi.cli", "deploy", "-r", "--file", str(config)],
                cwd=leftovers, env={**kept, **own}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=KOCO_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeployFailed(
                f"koco deploy -r did not end well: {error}\n  Fix: ./hitl deploy again"
            ) from error
    output = done.stdout + done.stderr
    if done.returncode or "deployment succeeded" not in output:
        raise DeployFailed(f"koco deploy -r failed, and nothing was changed:\n{reason(output)}")


def _authentication(settings: Settings, folder: Path) -> dict[str, str]:
    """Writes the token for Ray's own commands to a file in `folder`, because other users can read an environment."""
    token = read_ray_token(settings)
    if token is None:
        return {"RAY_AUTH_MODE": "disabled"}
    write_secret(folder / RAY_TOKEN, token)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / RAY_TOKEN)}


def _report(settings: Settings, built: Package) -> None:
    """Raises Unavailable where the code runs, but cannot be reached from here."""
    url = settings.service_url

    def answers() -> dict[str, Any] | None:
        try:
            answer = network.request("GET", f"{url}/v1/health", timeout=10)
            found = {**answer.json(), **said_to_a_key(url, settings)} if answer.is_success else {}
        except (httpx.HTTPError, ValueError):
            return None
        # Without a key it says which code it runs, and not of which package.
        same = (
            found["package"] == built.origin.package
            if "package" in found
            else found.get("code") == code_version()
        )
        return found if same else None

    found = wait_for(answers, ANSWER_S)
    if found is None:
        raise Unavailable(
            f"Serve says that the new code runs, but it does not answer at {url}\n"
            "  Fix: correct HITL_SERVE_URL, or forward that port; ./hitl status looks again"
        )
    typer.echo(f"deployed   {describe_origin({**built.origin.facts(), **found})}")
    typer.echo(f"REST       {settings.service_url}/v1   (code {found['code']}, model: {found['model']})")
    for remark in _images(settings):
        say(remark)


def _images(settings: Settings) -> list[str]:
    """Problems of the images of the service's environments. Sessions in them would end with that reason."""
    if settings.api_key is None:
        return ["HITL_API_KEY is not set here, so images were not checked"]
    try:
        with closing(Client.open(settings)) as client:
            return image_remarks(client.get("/v1/environments")["data"])
    except HitlError as error:
        return [f"images were not checked: {error}"]


def image_remarks(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a remark for each image that the cluster lacks, or that was built for another Ray or Python."""
    ours = {"ray": version("ray"), "python": build_info.python_minor()}
    remarks: list[str] = []
    for environment in environments:
        image, facts = environment.get("image"), environment.get("image_facts") or {}
        if image and not facts:
            remarks.append(
                f"the cluster does not have {image}, or not yet: ./hitl doctor there says what is wrong"
            )
        for name, wanted in ours.items() if facts else ():
            if facts.get(name) != wanted:
                remarks.append(
                    f"{image} has {name} {facts.get(name)}, and {wanted} is needed: rebuild it with ./hitl image build"
                )
    return remarks
