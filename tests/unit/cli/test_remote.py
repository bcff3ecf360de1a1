"""From the development machine, each thing that can be wrong with a cluster is told with what mends it."""

import socket
import sys
from collections.abc import Callable
from importlib.metadata import version

import pytest

from claude_hitl_template.cli.deploy import remote
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.presentation.checks import Check, lines

HEALTHY = {"code": "c0de", "commit": "0123456789abcdef"}
RAY = version("ray")
PYTHON = ".".join(map(str, sys.version_info[:2]))
DASHBOARD = {
    "/api/version": {"ray_version": RAY},
    "/api/v0/cluster_metadata": {"data": {"pythonVersion": f"{PYTHON}.1"}},
    "/api/serve/applications/": {"applications": {"claude-hitl": {"status": "RUNNING"}}},
}


@pytest.mark.parametrize(
    ("check", "level"),
    [
        (remote.version_check("Ray", "2.60.0", "2.60.0"), "ok"),
        (remote.version_check("Ray", "2.60.0", "2.59.0"), "wrong"),
        (remote.version_check("Python", "3.12", None), "warning"),
        (remote.skew_check(100.0, 104.0), "ok"),
        (remote.skew_check(100.0, 10.0), "warning"),
        (remote.skew_check(100.0, 200.0), "warning"),
        (remote.skew_check(100.0, None), "warning"),
        (remote.application_check(None), "wrong"),
        (remote.application_check({"status": "RUNNING"}), "ok"),
        (remote.application_check({"status": "DEPLOYING"}), "warning"),
        (remote.application_check({"status": "DEPLOY_FAILED", "message": "no module"}), "wrong"),
        (remote.health_check("u", 404, {}, "c0de"), "wrong"),
        (remote.health_check("u", 200, HEALTHY, "c0de"), "ok"),
        (remote.health_check("u", 200, HEALTHY, "newer"), "warning"),
    ],
    ids=str,
)
def test_each_check_tells_good_from_bad_and_has_a_mend_where_it_is_bad(check: Check, level: str) -> None:
    assert check.level == level
    assert (check.level == "ok") != bool(check.fix)


def test_the_direction_of_a_skew_is_told() -> None:
    assert "90 s behind" in remote.skew_check(100.0, 10.0).found
    assert "100 s ahead of" in remote.skew_check(100.0, 200.0).found


def test_why_an_application_failed_is_told_on_one_line() -> None:
    found = remote.application_check({"status": "DEPLOY_FAILED", "message": "Traceback\n  SyntaxError: x"})
    assert "SyntaxError: x" in found.found
    assert "\n" not in found.found


def test_a_cluster_that_is_not_there_is_told_at_every_address(
    make_settings: Callable[..., Settings], free_port: int
) -> None:
    url = f"127.0.0.1:{free_port}"
    settings = make_settings(
        dashboard_url=f"http://{url}",
        serve_url=f"http://{url}",
        ray_address=f"ray://{url}",
        panel_port=free_port,
    )
    found = {check.name: check for check in remote.examine(settings, 1.0)}
    assert {check.level for check in found.values()} == {"wrong"}
    assert set(found) == {"dashboard", "Ray Client", "service", "panel"}
    assert "HITL_DASHBOARD_URL" in found["dashboard"].fix


def test_a_dashboard_tells_versions_clocks_and_the_application(
    make_settings: Callable[..., Settings], answering: Callable[..., str]
) -> None:
    settings = make_settings(
        dashboard_url=answering(200, DASHBOARD), serve_url=answering(200, {"/claude-hitl/v1/health": HEALTHY})
    )
    found = {check.name: check.level for check in remote.examine(settings, 0.1)}
    assert {name: found[name] for name in ("dashboard", "Ray", "Python", "clocks", "application")} == {
        "dashboard": "ok", "Ray": "ok", "Python": "ok", "clocks": "ok", "application": "ok",
    }  # fmt: skip
    assert found["service"] == "warning"


def test_what_answers_and_is_no_dashboard_is_told(
    make_settings: Callable[..., Settings], answering: Callable[..., str]
) -> None:
    first = next(iter(remote.examine(make_settings(dashboard_url=answering(200, {})))))
    assert (first.level, "is not Ray's dashboard" in first.found) == ("wrong", True)


def test_a_port_that_leads_nowhere_is_no_ray_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = remote.ray_client_check(f"ray://127.0.0.1:{silent.getsockname()[1]}", 1.0)
    assert (found.level, "HITL_RAY_ADDRESS" in found.fix) == ("wrong", True)


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (401, "wrong")])
def test_a_key_that_the_service_refuses_is_told_and_not_shown(
    make_settings: Callable[..., Settings], answering: Callable[..., str], status: int, level: str
) -> None:
    found = remote.key_check(make_settings(serve_url=answering(status), api_key="key-oops"))
    assert found.level == level
    assert "oops" not in "".join(lines(found))
