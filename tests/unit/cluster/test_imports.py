"""What each process of the service imports: no more than it needs. Imports are most of a start, and much of the memory."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.takes_long("a process imports Ray and a part of the service")

OURS = "claude_hitl_template"
SDK, DATABASE = {"claude_agent_sdk", "mcp"}, {"sqlalchemy", "alembic", "psycopg"}
PAGES = {"kodosumi", "jinja2", f"{OURS}.api.app", f"{OURS}.inbox.app", f"{OURS}.cluster.ingress"}
DRIVING = {f"{OURS}.session.runner", f"{OURS}.cluster.owner"}


@pytest.mark.parametrize(
    ("imported", "unused"),
    [
        pytest.param((), SDK | DATABASE | PAGES | DRIVING | {f"{OURS}.store.core"}, id="driver"),
        pytest.param(("store.connect", "store.core"), SDK | PAGES | DRIVING, id="ledger"),
        pytest.param(
            ("cluster.ray_host", "cluster.containers", "notify.courier"),
            SDK | DATABASE | PAGES,
            id="supervisor",
        ),
        pytest.param(("cluster.ingress",), SDK | DATABASE | {"kodosumi"} | DRIVING, id="ingress"),
        pytest.param(
            ("cluster.owner",),
            DATABASE | PAGES | {f"{OURS}.store.core", f"{OURS}.model.endpoint"},
            id="owner",
        ),
    ],
)
def test_a_process_imports_what_it_needs_on_top_of_the_deployments(
    imported: tuple[str, ...], unused: set[str]
) -> None:
    modules = ", ".join(f"{OURS}.{name}" for name in ("cluster.deployments", *imported))
    code = f"import sys, {modules}; print(sorted({unused!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_owner_on_the_ledgers_machine_imports_no_ray_serve() -> None:
    modules = f"{OURS}.cluster.actor, {OURS}.cluster.owner"
    code = f"import sys, {modules}; print(sorted({{'ray.serve', 'grpc'}} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
