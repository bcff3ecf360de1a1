"""Entries of the audit log as OCSF events."""

from typing import Any

import pytest

from claude_hitl_template.domain.audit import Head, seal
from claude_hitl_template.domain.audit.ocsf import to_ocsf
from tests.unit.domain.test_audit import draft

# Class, what the class requires in addition to what each event has, and the activity.
CLASSES = {
    "approval.decided": (6003, {"api", "src_endpoint", "actor"}, 3),
    "audit.exported": (6003, {"api", "src_endpoint", "actor"}, 2),
    "sign_in": (3002, {"user", "service"}, 1),
    "sign_in.failed": (3002, {"user", "service"}, 1),
    "role.changed": (3001, {"user"}, 99),
    "key.created": (3004, {"entity"}, 1),
    "key.revoked": (3004, {"entity"}, 4),
    "rules.changed": (3004, {"entity"}, 3),
    "made.by_a_later_version": (6003, {"api", "src_endpoint", "actor"}, 3),
}


def event(action: str) -> dict[str, Any]:
    one = draft(1)
    made = type(one)(one.workspace_id, action, one.actor, one.target, one.details, one.time)
    return to_ocsf(seal(made, Head()).wire())


@pytest.mark.parametrize("action", CLASSES)
def test_an_action_has_its_class(action: str):
    class_uid, required, activity = CLASSES[action]
    found = event(action)
    assert (found["class_uid"], found["activity_id"]) == (class_uid, activity)
    assert found["type_uid"] == class_uid * 100 + activity
    assert found["category_uid"] == class_uid // 1000
    assert required | {"severity_id", "time", "metadata"} <= found.keys()


def test_an_event_says_who_when_and_in_which_workspace():
    found = event("approval.decided")
    assert found["actor"]["user"] == {"name": "Zoë", "uid": "prin_1", "credential_uid": "key_1"}
    assert found["time"] == 1893499201000
    assert found["metadata"]["tenant_uid"] == "wrkspc_1"
    assert found["metadata"]["uid"] == seal(draft(1), Head()).hash
    assert found["status_id"] == 1
    assert event("sign_in.failed")["status_id"] == 2
