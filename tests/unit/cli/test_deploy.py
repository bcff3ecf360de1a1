"""A deploy stops before it changes anything, and says which side to change; what Serve says is read to its end."""

from importlib.metadata import version
from typing import Any

import pytest

from claude_hitl_template.cli.deploy import rollout
from claude_hitl_template.cli.deploy.cluster import Versions
from claude_hitl_template.config.build_info import python_minor
from claude_hitl_template.errors import ConfigError

RAY = version("ray")
URI = "gcs://hitl-0.zip"


@pytest.mark.parametrize("python", [f"{python_minor()}.1", None])
def test_the_same_versions_pass(python: str | None) -> None:
    rollout.check_versions(Versions(RAY, python))


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (Versions("2.9.0", f"{python_minor()}.1"), f"runs Ray 2.9.0, and this checkout is locked to {RAY}"),
        (Versions(RAY + ".1", None), f"runs Ray {RAY}.1"),
        (Versions(RAY, "3.9.2"), f"runs Python 3.9.2, and here it is {python_minor()}"),
        (Versions(RAY, "3.1"), "runs Python 3.1"),
    ],
)
def test_other_versions_stop_it_and_say_what_to_do_on_which_side(found: Versions, named: str) -> None:
    with pytest.raises(ConfigError, match="nothing was uploaded") as raised:
        rollout.check_versions(found)
    assert named in str(raised.value)
    assert "on the cluster: " in raised.value.fix
    assert "here: " in raised.value.fix


def serve(source: str = "declarative", status: str = "RUNNING", **more: Any) -> dict[str, Any]:
    return {"applications": {"other": {"source": source, "status": status, **more}}}


def test_an_application_that_would_be_deleted_is_named() -> None:
    with pytest.raises(ConfigError, match="would delete what else runs on the cluster: other"):
        rollout.check_applications(serve(), {"ours.yaml": {"name": "claude-hitl"}})
    rollout.check_applications(
        serve(), {"ours.yaml": {"name": "claude-hitl"}, "other.yaml": {"name": "other"}}
    )
    rollout.check_applications(serve("imperative"), {"ours.yaml": {"name": "claude-hitl"}})
    rollout.check_applications(serve(status="DELETING"), {"ours.yaml": {"name": "claude-hitl"}})
    rollout.check_applications({}, {"ours.yaml": {"name": "claude-hitl"}})


def app(status: str, uri: str | None = URI, **more: Any) -> dict[str, Any]:
    config = {"runtime_env": {"working_dir": uri}} if uri else None
    return {"applications": {"claude-hitl": {"status": status, "deployed_app_config": config, **more}}}


@pytest.mark.parametrize(
    "said",
    [
        {},
        app("DEPLOYING"),
        app("RUNNING", "gcs://before.zip"),
        app("RUNNING", None),
        app("DEPLOY_FAILED", None),
    ],
)
def test_what_is_not_known_yet_or_is_of_the_code_before_is_no_outcome(said: dict[str, Any]) -> None:
    assert rollout.outcome(said, URI) is None


def test_running_from_the_package_is_the_good_outcome() -> None:
    assert rollout.outcome(app("RUNNING"), URI) == ""
    assert rollout.outcome(app("RUNNING", None), None) == ""  # as plain koco deploys it


def test_a_failure_has_its_reason_of_the_application_or_of_the_deployment() -> None:
    message = "Traceback:\n  File ...\nModuleNotFoundError: No module named 'nothing'\n"
    assert "No module named 'nothing'" in str(rollout.outcome(app("DEPLOY_FAILED", message=message), URI))
    parts = {"Ledger": {"message": ""}, "Ingress": {"message": "it died"}}
    assert rollout.outcome(app("UNHEALTHY", message="", deployments=parts), URI) == "  it died"
    assert rollout.outcome(app("DEPLOY_FAILED", message=""), URI) == "  Serve gives no reason"


def test_a_long_reason_is_shown_from_its_end() -> None:
    shown = rollout.reason("\\n".join(f"line {n}" for n in range(100)))
    assert shown.splitlines()[-1] == "  line 99"
    assert len(shown.splitlines()) == rollout.REASON_LINES


def test_an_image_that_is_missing_or_of_other_versions_is_named() -> None:
    good = {"ray": RAY, "python": python_minor()}
    said = rollout.image_remarks(
        [
            {"image": None, "image_facts": None},
            {"image": "good", "image_facts": good},
            {"image": "gone", "image_facts": None},
            {"image": "old", "image_facts": {**good, "ray": "1.0"}},
        ]
    )
    assert len(said) == 2
    assert "does not have gone" in said[0]
    assert f"old has ray 1.0, and {RAY} is needed" in said[1]
