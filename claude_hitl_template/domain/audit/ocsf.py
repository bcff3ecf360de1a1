"""Maps entries to events of the Open Cybersecurity Schema Framework (OCSF 1.3), for a SIEM.

An event is a copy for searching and alerts: a chain is verified from the entries themselves, whose hash is the event's
`metadata.uid`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

OCSF_VERSION = "1.3.0"
PRODUCT = {"name": "claude-hitl", "vendor_name": "claude-hitl"}
_ACCOUNT_CHANGE, _AUTHENTICATION, _ENTITY_MANAGEMENT, _API_ACTIVITY = 3001, 3002, 3004, 6003
_CLASSES = {
    _ACCOUNT_CHANGE: ("Account Change", 3, "Identity & Access Management"),
    _AUTHENTICATION: ("Authentication", 3, "Identity & Access Management"),
    _ENTITY_MANAGEMENT: ("Entity Management", 3, "Identity & Access Management"),
    _API_ACTIVITY: ("API Activity", 6, "Application Activity"),
}
_INFORMATIONAL, _MEDIUM, _HIGH = (1, "Informational"), (3, "Medium"), (4, "High")
_OTHER = (99, "Other")
_CREATE, _READ, _UPDATE, _DELETE = (1, "Create"), (2, "Read"), (3, "Update"), (4, "Delete")


@dataclass(frozen=True)
class _Mapped:
    class_uid: int
    activity: tuple[int, str]
    severity: tuple[int, str] = _INFORMATIONAL
    failed: bool = False


_BY_ACTION: Mapping[str, _Mapped] = {
    "sign_in": _Mapped(_AUTHENTICATION, (1, "Logon")),
    "sign_in.failed": _Mapped(_AUTHENTICATION, (1, "Logon"), _MEDIUM, failed=True),
    "sign_out": _Mapped(_AUTHENTICATION, (2, "Logoff")),
    "role.changed": _Mapped(_ACCOUNT_CHANGE, _OTHER, _MEDIUM),
    "principal.created": _Mapped(_ACCOUNT_CHANGE, (1, "Create")),
    "principal.enabled": _Mapped(_ACCOUNT_CHANGE, (2, "Enable")),
    "principal.disabled": _Mapped(_ACCOUNT_CHANGE, (5, "Disable")),
    "principal.changed": _Mapped(_ACCOUNT_CHANGE, _OTHER),
    "password.changed": _Mapped(_ACCOUNT_CHANGE, (3, "Password Change")),
    "principal.locked": _Mapped(_ACCOUNT_CHANGE, (9, "Lock"), _MEDIUM),
    "key.created": _Mapped(_ENTITY_MANAGEMENT, _CREATE),
    "key.rotated": _Mapped(_ENTITY_MANAGEMENT, _UPDATE),
    "key.revoked": _Mapped(_ENTITY_MANAGEMENT, _DELETE),
    "rules.changed": _Mapped(_ENTITY_MANAGEMENT, _UPDATE, _MEDIUM),
    "channel.created": _Mapped(_ENTITY_MANAGEMENT, _CREATE),
    "channel.changed": _Mapped(_ENTITY_MANAGEMENT, _UPDATE),
    "channel.removed": _Mapped(_ENTITY_MANAGEMENT, _DELETE),
    "workspace.created": _Mapped(_ENTITY_MANAGEMENT, _CREATE),
    "workspace.changed": _Mapped(_ENTITY_MANAGEMENT, _UPDATE),
    "audit.exported": _Mapped(_API_ACTIVITY, _READ),
    "break_glass": _Mapped(_API_ACTIVITY, _OTHER, _HIGH),
}
_DEFAULT = _Mapped(_API_ACTIVITY, _UPDATE)  # decisions, votes, and every other action


def to_ocsf(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The OCSF event of an entry's wire form."""
    mapped = _BY_ACTION.get(entry["action"], _DEFAULT)
    name, category, category_name = _CLASSES[mapped.class_uid]
    activity_id, activity = mapped.activity
    severity_id, severity = mapped.severity
    return {
        "activity_id": activity_id,
        "activity_name": activity,
        "category_uid": category,
        "category_name": category_name,
        "class_uid": mapped.class_uid,
        "class_name": name,
        "type_uid": mapped.class_uid * 100 + activity_id,
        "type_name": f"{name}: {activity}",
        "severity_id": severity_id,
        "severity": severity,
        "status_id": 2 if mapped.failed else 1,
        "status": "Failure" if mapped.failed else "Success",
        "time": int(datetime.fromisoformat(entry["time"]).timestamp() * 1000),
        "message": f"{entry['actor']['name']}: {entry['action']} {entry['target']}".rstrip(),
        "metadata": {
            "version": OCSF_VERSION,
            "product": PRODUCT,
            "uid": entry["hash"],
            "sequence": entry["seq"],
            "tenant_uid": entry["workspace_id"],
            "event_code": entry["action"],
        },
        "actor": {"user": _user(entry["actor"])},
        **_OF_CLASS[mapped.class_uid](entry),
        "unmapped": {"details": entry["details"], "previous": entry["previous"]},
    }


def _user(actor: Mapping[str, Any]) -> dict[str, Any]:
    uid = {} if actor["id"] is None else {"uid": actor["id"]}
    key = {} if actor["key_id"] is None else {"credential_uid": actor["key_id"]}
    return {"name": actor["name"], **uid, **key}


def _api_activity(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "api": {"operation": entry["action"], "service": {"name": PRODUCT["name"]}},
        "src_endpoint": {"svc_name": PRODUCT["name"]},
        "resources": [{"uid": entry["target"], "type": entry["action"].partition(".")[0]}],
    }


def _authentication(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"user": _user(entry["actor"]), "service": {"name": PRODUCT["name"]}}


def _account_change(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"user": {"uid": entry["target"]}}


def _entity_management(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"entity": {"uid": entry["target"], "type": entry["action"].partition(".")[0]}}


_OF_CLASS: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    _ACCOUNT_CHANGE: _account_change,
    _AUTHENTICATION: _authentication,
    _ENTITY_MANAGEMENT: _entity_management,
    _API_ACTIVITY: _api_activity,
}
