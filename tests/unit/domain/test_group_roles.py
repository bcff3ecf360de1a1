"""HITL_OIDC_ROLES: what groups give, and which part of a wrong one is wrong."""

import pytest

from claude_hitl_template.domain.group_roles import GroupRole, read_group_roles
from claude_hitl_template.domain.people import Role
from claude_hitl_template.domain.sign_in import replaced_roles


def test_groups_give_roles() -> None:
    text = "approvers=default:approver; CN=Ops,OU=it = payments:operator;admins=*:admin;*=default:viewer;"
    assert read_group_roles(text) == (
        GroupRole("approvers", "default", Role.APPROVER),
        GroupRole("CN=Ops,OU=it", "payments", Role.OPERATOR),
        GroupRole("admins", "*", Role.ADMIN),
        GroupRole("*", "default", Role.VIEWER),
    )
    assert read_group_roles("") == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("approvers", "'approvers' is not GROUP=WORKSPACE:ROLE"),
        ("a=default:viewer;approvers=approver", "'approvers=approver' is not"),
        ("=default:approver", "is not GROUP=WORKSPACE:ROLE"),
        ("a=default:aprover", "there is no role 'aprover'; there are viewer, requester"),
        ("a=default:admin", r"of the whole service, so write \*:admin"),
    ],
)
def test_a_wrong_entry_is_quoted(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_group_roles(text)


def test_roles_of_groups_are_replaced_and_others_stay() -> None:
    viewer, approver, operator = (Role.VIEWER,), (Role.APPROVER,), (Role.OPERATOR,)
    assert replaced_roles({}, {}, {"w": approver}) == {"w": approver}
    assert replaced_roles({"w": approver}, {"w": approver}, {}) == {}
    assert replaced_roles({"w": (*viewer, *approver)}, {"w": approver}, {"x": operator}) == {
        "w": viewer,
        "x": operator,
    }
    assert replaced_roles({"w": approver}, {"w": approver}, {"w": approver}) == {"w": approver}
