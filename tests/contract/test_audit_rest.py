"""The audit log over REST and in the terminal: the guide's example, filters, exports, receipts, and who may see what."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from claude_hitl_template.cluster import ROUTE
from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.audit.receipts import verify_receipt
from claude_hitl_template.domain.audit.signing import keys_of_jwks
from claude_hitl_template.domain.audit.verification import verify
from claude_hitl_template.domain.people import Principal
from claude_hitl_template.testing.clock import FakeClock
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread
from tests.contract.asking import ask_for, create

GUIDE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
ROOT = Path(__file__).parents[2]
CANARY = "canary-7c2e"
FIRST, OTHER = "first-key-of-the-audit-tests", "another-key-of-the-audit-tests"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Threaded]:
    folder = tmp_path_factory.mktemp("audit")
    with serve_in_thread(folder, keys={"first": FIRST, "other": OTHER}, driving=False) as one:
        yield one


@pytest.fixture
def api(served: Threaded) -> Iterator[httpx.Client]:
    with client(served, FIRST) as one:
        yield one


def client(served: Threaded, key: str) -> httpx.Client:
    return httpx.Client(base_url=served.service.url, headers={"x-api-key": key}, timeout=30)


def workspace_of(served: Threaded, name: str) -> str:
    return next(key.id for key in served.run(served.service.store.list_keys()) if key.name == name)


def waiting(served: Threaded, name: str = "first") -> str:
    """The id of an approval that waits in the workspace of this key."""
    store, workspace_id = served.service.store, workspace_of(served, name)

    async def make() -> str:
        session = await create(store, workspace_id=workspace_id)
        await store.acquire(session.id, "owner", lease_s=15)
        [approval] = await store.open_calls(session.id, 1, [], [ask_for("c1")], cwd="/w", expires_at=None)
        return approval.id

    return served.run(make())


def denied(served: Threaded, api: httpx.Client) -> str:
    approval_id = waiting(served)
    body = {"result": "deny", "deny_message": CANARY}
    assert api.post(f"/v1/approvals/{approval_id}/decide", json=body).status_code == 200
    return approval_id


@pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("bash", "curl", "jq", "sed")),
    reason="needs bash, curl, jq and sed",
)
@pytest.mark.takes_long("starts the command line five times")
def test_the_guides_example_does_what_it_says(served: Threaded, tmp_path: Path):
    with client(served, OTHER) as other:
        approval_id = waiting(served, "other")
        assert other.post(f"/v1/approvals/{approval_id}/decide", json={"result": "deny"}).status_code == 200
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    hitl = f"{sys.executable} -m claude_hitl_template.cli"
    environment = {
        **os.environ,
        "HITL_URL": served.service.url,
        "HITL_SERVE_URL": served.service.url.removesuffix(ROUTE),
        "HITL_API_KEY": OTHER,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-c", "set -eu\n" + "\n".join(blocks).replace("./hitl", hitl)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert re.search(r"whole: entries 1 to \d+ of workspace", said)
    [expected] = re.findall(r"^```text\n(.*?)\n```", GUIDE, re.DOTALL | re.MULTILINE)
    assert re.search(re.sub(r"\d+", r"\\d+", expected), said)
    assert "exit status 1" in said
    assert f"whole: {approval_id}, approval.decided: deny by other" in said


def test_an_export_verifies_with_the_published_key(served: Threaded, api: httpx.Client):
    denied(served, api)
    keys = keys_of_jwks(api.get("/v1/audit/keys").json())
    answer = api.get("/v1/audit/export")
    assert answer.headers["content-type"].startswith("application/jsonl")
    lines = answer.text.splitlines()
    report = verify(lines, keys)
    assert report.problems == ()
    assert report.workspace_id == workspace_of(served, "first")
    assert verify(lines[1:], keys).problems[0].kind == "missing"
    assert CANARY not in answer.text
    later = api.get("/v1/audit/export", params={"from_seq": report.entries})
    assert verify(later.text.splitlines(), keys).problems == ()
    assert verify(later.text.splitlines(), keys).from_seq == report.entries


def test_an_export_for_a_siem_has_one_event_for_each_entry(served: Threaded, api: httpx.Client):
    denied(served, api)
    events = [json.loads(line) for line in api.get("/v1/audit/export?format=ocsf").text.splitlines()]
    listed = api.get("/v1/audit", params={"limit": 1000, "order": "asc"}).json()["data"]
    assert [event["metadata"]["uid"] for event in events] == [entry["hash"] for entry in listed]
    assert events[-1]["metadata"]["event_code"] == "audit.exported"


def test_entries_are_filtered_and_paged(served: Threaded, api: httpx.Client):
    approvals = {denied(served, api) for _ in range(3)}
    params = {"action": "approval.decided", "limit": 2}
    first = api.get("/v1/audit", params=params).json()
    second = api.get("/v1/audit", params={**params, "page": first["next_page"]}).json()
    assert approvals <= {entry["target"] for entry in (*first["data"], *second["data"])}
    [entry] = api.get("/v1/audit", params={"target": next(iter(approvals))}).json()["data"]
    assert (entry["actor"]["name"], entry["details"]["result"]) == ("first", "deny")
    assert entry["actor"]["key_id"] == workspace_of(served, "first")
    assert api.get("/v1/audit", params={"actor": entry["actor"]["id"]}).json()["data"]
    assert api.get("/v1/audit", params={"created_at[gt]": "2999-01-01T00:00:00Z"}).json()["data"] == []
    refused = api.get("/v1/audit", params={"page": first["next_page"]})
    assert (refused.status_code, "page" in refused.text) == (400, True)


def test_a_receipt_is_of_ones_own_workspace_and_of_a_decision(served: Threaded, api: httpx.Client):
    approval_id, pending = denied(served, api), waiting(served)
    receipt = api.get(f"/v1/approvals/{approval_id}/receipt").json()
    assert verify_receipt(receipt, keys_of_jwks(api.get("/v1/audit/keys").json())) == ()
    assert receipt["decision"]["actor"]["name"] == "first"
    assert api.get(f"/v1/approvals/{pending}/receipt").status_code == 409
    assert api.get("/v1/approvals/appr_never/receipt").status_code == 404
    with client(served, OTHER) as other:
        for one in (approval_id, pending):
            assert other.get(f"/v1/approvals/{one}/receipt").status_code == 404


def test_a_workspace_sees_its_own_log_and_an_administrator_that_of_the_service(
    served: Threaded, api: httpx.Client
):
    approval_id = denied(served, api)
    with client(served, OTHER) as other:
        assert approval_id not in other.get("/v1/audit", params={"limit": 1000}).text
        assert approval_id not in other.get("/v1/audit/export").text
        for path in ("/v1/audit", "/v1/audit/export"):
            assert other.get(path, params={"chain": "service"}).status_code == 403
    [made_admin] = api.get("/v1/audit", params={"chain": "service"}).json()["data"]
    assert made_admin["action"] == "role.changed"
    lines = api.get("/v1/audit/export", params={"chain": "service"}).text.splitlines()
    assert verify(lines, None).problems == ()
    assert verify(lines, None).workspace_id == "service"


def test_an_approver_gets_receipts_and_not_the_log(served: Threaded, api: httpx.Client):
    store, approval_id = served.service.store, denied(served, api)
    approver = Principal(
        id="user_ann",
        kind="user",
        name="ann",
        created_at=FakeClock().now,
        roles={workspace_of(served, "first"): ("approver",)},  # type: ignore[dict-item]
    )
    served.run(store.add_key("ann's", hash_api_key("ann"), principal=approver))
    with client(served, "ann") as ann:
        assert ann.get(f"/v1/approvals/{approval_id}/receipt").status_code == 200
        assert ann.get("/v1/audit/keys").status_code == 200
        for path in ("/v1/audit", "/v1/audit/export"):
            assert ann.get(path).status_code == 403


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"from_seq": "0"}, "from_seq"),
        ({"from_seq": "1.0"}, "from_seq"),
        ({"from_seq": "999999"}, "from_seq"),
        ({"format": "csv"}, "format"),
        ({"chain": "all"}, "chain"),
        ({"action": "approval.decided"}, "action"),
    ],
)
def test_a_wrong_export_is_refused_and_not_recorded(api: httpx.Client, params: dict[str, Any], field: str):
    def count() -> int:
        return len(api.get("/v1/audit", params={"limit": 1000}).json()["data"])

    before = count()
    answer = api.get("/v1/audit/export", params=params)
    assert (answer.status_code, field in answer.json()["error"]["message"]) == (400, True)
    assert count() == before


def test_secrets_are_in_no_entry(served: Threaded, api: httpx.Client):
    texts = [api.get(f"/v1/audit/export?chain={chain}").text for chain in ("workspace", "service")]
    for secret in (FIRST, OTHER, CANARY, hash_api_key(FIRST)):
        assert secret not in "".join(texts)
