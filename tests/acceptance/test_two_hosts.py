"""A laptop, a virtual machine with the cluster, and a second node, simulated by network namespaces."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from claude_hitl_template.store.owners import LEASE_S
from tests.acceptance import browser
from tests.acceptance.conftest import PICTURES
from tests.acceptance.hosts import ADDRESSES, ROOT, Hosts, require_namespaces
from tests.integration.harness import KEY, Conversation, Service, script, wait_for

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PORTS = {"RAY": 6379, "RAY_CLIENT": 10001, "DASHBOARD": 8265, "SERVE": 8001, "PANEL": 3370}
GUIDE = (ROOT / "docs/orbstack-setup.md").read_text()
CLUSTER = """
import json, sys, ray
ray.init(sys.argv[1], namespace="test", log_to_driver=False)
print(json.dumps({"nodes": [n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]], "version": ray.__version__}))
"""
# Once there are two nodes, sets all CPUs of the head aside: what starts then, starts on the other one.
FILL = """
import json, sys, time, ray
ray.init(sys.argv[1], namespace="test", log_to_driver=False)
while len([n for n in ray.nodes() if n["Alive"]]) < 2: time.sleep(0.2)
@ray.remote(num_cpus=1, resources={"node:" + sys.argv[2]: 0.01})
class Filler:
    def there(self): return True
filler = Filler.options(name="filler", lifetime="detached").remote()
print(json.dumps(ray.get(filler.there.remote())))
"""
EMPTY = """
import json, sys, time, ray
ray.init(sys.argv[1], namespace="test", log_to_driver=False)
if "filler" in ray.util.list_named_actors(): ray.kill(ray.get_actor("filler"))
print(json.dumps(True))
"""
# As it was before: with room on the head, and no other node, for sessions go to a dead one until Ray misses it.
ALONE = f"""{EMPTY}
while len([n for n in ray.nodes() if n["Alive"]]) > 1: time.sleep(0.2)
print(json.dumps(True))
"""
SHORT_S = 4.0  # such a link is not missed: a lease lasts longer


@dataclass
class Vm(Service):
    """The service as `./hitl up` starts it in the VM, on the documented ports; reachable from the host of the test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.environment |= {f"HITL_{name}_PORT": str(port) for name, port in PORTS.items()}
        self.environment |= {
            "HITL_SANDBOX_READ": str(self.root / "where"),
            "HITL_SANDBOX_WRITE": str(self.shared),
        }
        (self.root / "where").mkdir()
        (self.root / "where/host").write_text("on-vm\n")
        self.shared.mkdir()

    @property
    def where(self) -> str:
        """A command that prints on which host it runs, by the one file visible in sandboxes that differs."""
        return f"cat {self.root}/where/host"

    @property
    def shared(self) -> Path:
        """A folder that sandboxes on each host can write to, through which a test observes a running call."""
        return self.root / "shared"

    @property
    def base(self) -> str:
        """The service's address for the mac: its own localhost, unless the VM listens for other hosts."""
        return f"http://{self.environment.get('HITL_HOST', '127.0.0.1')}:{PORTS['SERVE']}/claude-hitl"


@dataclass
class Mac:
    """The development machine: its own working tree and commands, without the VM's settings."""

    folder: Path
    vm: Vm

    def check_out(self) -> None:
        """Creates the working tree, with a profile made from the example, as a user would."""
        names = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        # A deploy refuses files that hold a secret, and the tests hold the VM's key.
        for name in (name for name in names if name and not name.startswith("tests/")):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.folder / name)
        _git(self.folder, "init", "--quiet")
        _git(self.folder, "add", ".")
        _git(
            self.folder, "-c", "user.name=Test", "-c", "user.email=test@example.com", "commit", "-qm", "first"
        )
        profile = (self.folder / "profiles/vm.env.example").read_text()
        ours = f"HITL_API_KEY={KEY}\nHITL_RAY_TOKEN={self.vm.ray_token}\n"
        (self.folder / "profiles/vm.env").write_text(f"{profile}\n{ours}")

    def hitl(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, "-m", "claude_hitl_template.cli", *args)

    def change_what_the_model_says(self, text: str) -> None:
        path = self.folder / "claude_hitl_template/model/scenarios/write_file.yaml"
        path.write_text(
            re.sub(r'when: ok\n    text: ".*"', f'when: ok\n    text: "{text}"', path.read_text())
        )

    @property
    def environment(self) -> dict[str, str]:
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HITL_", "ANTHROPIC_", "KODO_", "RAY_"))
        }
        own = {"HITL_HOME": str(self.folder), "RAY_DASHBOARD_ADDRESS": "http://localhost:8265"}
        return {**inherited, **own, **self.vm.ray_login}

    def run(self, *command: str, typed: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command, cwd=self.folder, env={**self.environment, **environment},
            input=typed,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def client(self, code: str, *args: str, host: str = "localhost") -> Any:
        """Returns what `code` prints as JSON, given Ray Client's address. Retries, because the first connection
        sometimes fails."""
        said: list[str] = []

        def once() -> list[str] | None:
            done = self.run(sys.executable, "-c", code, f"ray://{host}:10001", *args)
            said.append(done.stderr)
            return done.stdout.splitlines() if done.returncode == 0 else None

        return json.loads(wait_for(f"Ray Client; it said {said}", once)[-1])


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class MacPanel(browser.Panel):
    """The panel in the laptop's browser: on the laptop's localhost, with the entries at the VM's addresses."""

    @property
    def base(self) -> str:
        return "http://localhost:3370"

    def entry(self, name: str) -> str:
        return f"{self.base}/inputs/-/127.0.0.1/8001/claude-hitl/-/{name}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    require_namespaces()
    made = Hosts()
    try:
        made.open()
        yield made
    finally:
        made.close()
    assert not [name for name in ADDRESSES if made.processes(name)]


@pytest.fixture(scope="module")
def vm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """A running VM that listens on its loopback only, with its ports forwarded to the mac. Calls are parked as soon
    as they wait."""
    one = Vm(
        tmp_path_factory.mktemp("vm"),
        {
            "HITL_PANEL": "true",
            "HITL_HOT_WINDOW_S": "0",
            "HITL_IDLE_TIMEOUT_S": "1",
            "HITL_SPARE_OWNERS": "0",
            "HITL_RAY_NUM_CPUS": "1",
        },
        hosts.on("vm", sys.executable, "-m", "claude_hitl_template.cli"),
    )
    try:
        one.up()
        hosts.forward(list(PORTS.values()))
        yield one
    finally:
        one.down()


@pytest.fixture(scope="module", autouse=True)
def mac(hosts: Hosts, vm: Vm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mac]:
    """Runs all tests on the mac."""
    one = Mac(tmp_path_factory.mktemp("mac"), vm)
    one.check_out()
    with hosts.inside("mac"):
        yield one


def last_said(session: Conversation) -> str:
    return session.events("agent.message")[-1]["content"][0]["text"]


def test_ray_client_reaches_the_cluster_through_the_macs_own_localhost(mac: Mac):
    assert len(mac.client(CLUSTER)["nodes"]) == 1


def test_the_official_sdk_has_a_conversation_from_the_mac(mac: Mac):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    url = "http://localhost:8001/claude-hitl"
    done = mac.run(sys.executable, "-c", code, typed="y\n", HITL_URL=url, HITL_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert "allow? [y/n] Done: `hello.txt` is in the working directory" in done.stdout


def test_the_panel_opens_in_the_macs_browser_and_a_decision_counts(vm: Vm):
    password = (vm.root / "data" / "secrets" / "panel-password").read_text().strip()
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        window = browser.launch(playwright)
        panel = MacPanel(vm, window.new_context(viewport=None), PICTURES)
        panel.log_in("admin", password)
        panel.start("Write hello.txt with a greeting")
        panel.open_form()
        panel.decide("Allow")
        panel.sees("hello.txt")
        panel.rests()
        assert not panel.problems
        window.close()


def lines_of_the_guide(where: str) -> list[str]:
    """Returns the commands of docs/orbstack-setup.md that are marked for a machine; "" for any machine."""
    blocks = re.findall(rf"^```sh{where}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_a_changed_working_tree_is_live_after_the_commands_of_the_guide(vm: Vm, mac: Mac):
    mac.change_what_the_model_says("As the mac has it.")
    said = ""
    for line in lines_of_the_guide(""):
        program, *arguments = shlex.split(line)
        assert program == "./hitl"
        done = mac.hitl(*arguments)
        assert done.returncode == 0, line + done.stdout + done.stderr
        said += done.stdout + done.stderr
    session = vm.start_session("Write hello.txt with a greeting")
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "end_turn"
    assert last_said(session) == "As the mac has it."
    facts = vm.call("GET", "/v1/version")
    assert (facts["commit"], facts["dirty"]) == (_git(mac.folder, "rev-parse", "HEAD").strip(), True)
    assert "http://localhost:3370" in said
    assert KEY not in said


def test_an_approval_that_waits_during_a_deploy_is_decided_and_runs_with_the_new_code(vm: Vm, mac: Mac):
    session = vm.start_session("Write hello.txt with a greeting")
    asked = session.until_asked()
    mac.change_what_the_model_says("As the mac has it since.")
    done = mac.hitl("deploy", "--profile", "vm")
    assert done.returncode == 0, done.stdout + done.stderr
    session.decide(asked)
    assert session.until_idle()["type"] == "end_turn"
    assert last_said(session) == "As the mac has it since."


def test_code_that_cannot_run_is_told_and_what_ran_goes_on(vm: Vm, mac: Mac):
    before = vm.call("GET", "/v1/version")
    broken = mac.folder / "claude_hitl_template/cluster/supervisor.py"
    text = broken.read_text()
    try:
        broken.write_text(text + "\nthis is invalid Python\n")
        done = mac.hitl("deploy", "--profile", "vm")
    finally:
        broken.write_text(text)
    assert done.returncode != 0
    assert "supervisor.py" in done.stdout + done.stderr
    assert vm.call("GET", "/v1/version") == before


def test_each_port_of_a_vm_that_is_off_is_named_from_the_mac(hosts: Hosts, mac: Mac):
    hosts.unforward()
    try:
        said = mac.hitl("doctor", "--profile", "vm", "--json").stdout
        deploy = mac.hitl("deploy", "--profile", "vm")
    finally:
        hosts.forward(list(PORTS.values()))
    off = {check["name"]: check for check in json.loads(said)}
    for name in ("dashboard", "Ray Client", "service", "panel"):
        assert off[name]["level"] == "wrong"
        assert "start the VM" in off[name]["fix"]
    assert deploy.returncode != 0
    assert "Fix:" in deploy.stderr


def test_koco_alone_deploys_from_the_mac_what_lies_on_the_cluster(vm: Vm, mac: Mac):
    assert vm.call("GET", "/v1/version")["package"]
    done = mac.run(str(BIN / "koco"), "deploy", "-r")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for("the cluster's own code", lambda: vm.call("GET", "/v1/version")["package"] is None or None)
    session = vm.start_session("Write hello.txt with a greeting")
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "end_turn"


@pytest.fixture
def join(hosts: Hosts, vm: Vm, mac: Mac) -> Iterator[Callable[[], None]]:
    """Joins a second node as the guide says; it has no access to the first one's data folder and Ray's folder."""
    joined: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        folders = [vm.root / "data", json.loads(vm.hitl("status", "--json").stdout)["ray"]["temp_dir"]]
        empty = " && ".join(f"mount -t tmpfs none {folder}" for folder in folders)
        (line,) = [line for line in lines_of_the_guide(" elsewhere") if "ray start" in line]
        empty += f" && mount -t tmpfs none {vm.root}/where && echo on-node > {vm.root}/where/host"
        copied = vm.root / "ray-token-of-the-node"
        copied.write_text(vm.ray_token)
        start = line.replace("10.0.0.5", ADDRESSES["vm"]).replace(".venv/bin", str(BIN))
        start = start.replace("$PWD/.hitl/secrets/ray-token", str(copied))
        own = f"--node-ip-address={ADDRESSES['node']} --num-cpus=1 --block"
        command = hosts.on("node", "sh", "-c", f"{empty} && {start} {own}")
        with (vm.root / "node.log").open("wb") as log:
            joined.append(subprocess.Popen(command, stdout=log, stderr=log, env=mac.environment))

    yield begin
    hosts.end("node")
    for process in joined:
        process.wait()
        mac.client(ALONE, host=ADDRESSES["vm"])


@pytest.fixture
def fill(vm: Vm, mac: Mac, join: Callable[[], None]) -> Callable[[], None]:
    """Joins the second node, and then occupies all room on the VM."""

    def begin() -> None:
        vm.up(HITL_HOST=ADDRESSES["vm"], HITL_PANEL="false")
        join()
        mac.client(FILL, ADDRESSES["vm"], host=ADDRESSES["vm"])

    return begin


def test_once_others_may_join_what_is_parked_goes_on_on_another_node_workspace_included(
    vm: Vm, fill: Callable[[], None]
):
    """Runs after the tests above, because it restarts the VM with an address that other hosts reach."""
    session = vm.start_session(script(f"{vm.where} > before.txt", f"cat before.txt; {vm.where}"))
    session.decide(session.until_asked())
    session.until_parked()
    fill()
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "end_turn"
    assert re.findall(r"on-\w+", last_said(session)) == ["on-vm", "on-node"]


@dataclass
class Far:
    """A session whose call runs on the second node until `let_it_end`."""

    session: Conversation
    journal: Path

    def let_it_end(self) -> None:
        self.journal.with_name("go").touch()

    @property
    def ran(self) -> list[str]:
        return self.journal.read_text().split()

    @property
    def outcomes(self) -> list[Any]:
        return [event.get("outcome") for event in self.session.events("agent.tool_result")]


@pytest.fixture
def far(vm: Vm, mac: Mac, fill: Callable[[], None]) -> Far:
    """A session on the second node; the VM has room for the owner that takes it over."""
    journal = Path(tempfile.mkdtemp(dir=vm.shared)) / "journal"
    journal.parent.chmod(0o777)
    command = f"{vm.where} >> {journal}; until [ -e {journal.parent}/go ]; do sleep 0.1; done; echo ran >> {journal}"
    session = vm.start_session(script(command))
    asked = session.until_asked()
    session.until_parked()
    fill()
    session.decide(asked)
    wait_for("the call to run", lambda: journal.exists() and journal.read_text())
    assert journal.read_text().split() == ["on-node"]
    mac.client(EMPTY, host=ADDRESSES["vm"])
    return Far(session, journal)


def test_a_node_that_is_cut_off_for_longer_than_the_lease_loses_its_session_and_writes_nothing_afterwards(
    hosts: Hosts, far: Far
):
    with hosts.cut_off("node"):
        wait_for("another owner", lambda: far.session.events("session.status_rescheduled") or None)
        assert far.session.until_idle()["type"] == "end_turn"
        assert far.outcomes == ["unknown"]
        before = far.session.events()
    far.let_it_end()
    wait_for("the end of the stale owner's CLI", lambda: not hosts.running("node", far.session.transcript_id))
    assert far.session.events() == before
    (approval,) = far.session.approvals()
    assert approval["state"] == "unknown"
    assert far.ran[0] == "on-node"
    assert not [line for line in far.ran[1:] if line != "ran"]


def test_a_link_that_is_down_for_less_than_the_lease_changes_nothing(hosts: Hosts, far: Far):
    assert SHORT_S < LEASE_S / 2
    with hosts.cut_off("node"):
        time.sleep(SHORT_S)
    far.let_it_end()
    assert far.session.until_idle()["type"] == "end_turn"
    assert not far.session.events("session.status_rescheduled")
    assert far.outcomes == [None]
    assert far.ran == ["on-node", "ran"]
