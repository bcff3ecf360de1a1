"""Removes safeguards of the Store by changing their source, to check that a test fails without each.

A process takes one away where `injected` is on its path and HITL_TEST_BUGS names it.
"""

import importlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

VARIABLE = "HITL_TEST_BUGS"
PACKAGE = "claude_hitl_template"


@dataclass(frozen=True)
class Change:
    """Replaces `old` by `new` in the source of a function or method ("Class.method") of a module below
    claude_hitl_template."""

    module: str
    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A removed safeguard. `missed_by` is a test of tests/contract/test_store.py or test_votes.py that must fail without
    it."""

    missed_by: str
    changes: tuple[Change, ...]


def _mutant(missed_by: str, *changes: tuple[str, str, str, str]) -> Mutant:
    return Mutant(missed_by, tuple(Change(*change) for change in changes))


MUTANTS = {
    "stale_owners_write": _mutant(
        "test_a_stale_owner_writes_nothing",
        (
            "store.session_aggregate",
            "SessionAggregate.check_owner",
            "lease is None or lease.epoch != epoch",
            "False",
        ),
    ),
    "any_input_runs": _mutant(
        "test_the_edited_input_is_what_may_run",
        ("store.owners", "OwnerRules.claim", "approval.run_digest != run_digest", "False"),
    ),
    "refused_calls_run": _mutant(
        "test_a_denied_call_is_never_claimed",
        (
            "store.owners",
            "OwnerRules.claim",
            'raise NotWaiting(f"call {call_id} is {approval.state.value}, not allowed")',
            "approval = approval.but(state=ApprovalState.ALLOWED, run_digest=run_digest)",
        ),
    ),
    "claims_are_not_counted": _mutant(
        "test_an_allowed_call_is_claimed_once",
        ("store.owners", "OwnerRules.claim", "await unit.tx.put_approval(claimed)", "pass"),
    ),
    "the_last_decision_wins": _mutant(
        "test_of_decisions_at_once_the_first_wins",
        (
            "store.decisions",
            "confirm",
            "return [await _repeated(unit, approval, decision)]",
            "approval = approval.but(state=ApprovalState.PENDING)",
        ),
    ),
    "a_message_decides": _mutant(
        "test_a_message_decides_nothing",
        (
            "store.clients",
            "_queue",
            "if not (waits and await unit.holds_up()):",
            """for approval in await unit.pending() if waits else []:
        yes = UserToolConfirmation(
            type="user.tool_confirmation", tool_use_id=approval.event_id, result="allow"
        )
        await confirm(unit, yes, "mutant")
    if not (waits and await unit.holds_up()):""",
        ),
    ),
    "time_allows": _mutant(
        "test_what_is_due_expires_and_nothing_else",
        (
            "store.supervision",
            "SupervisorRules._expire",
            "approval.to(ApprovalState.EXPIRED",
            "approval.to(ApprovalState.ALLOWED",
        ),
    ),
    "unknown_calls_run_again": _mutant(
        "test_a_claimed_call_without_a_result_becomes_unknown_once",
        (
            "store.session_aggregate",
            "SessionAggregate.close_unknown",
            "await self.tx.put_approval(approval.to(ApprovalState.UNKNOWN, closed_at=self.now))",
            "await self.tx.put_approval(approval.but(state=ApprovalState.ALLOWED, claim_id=None))\n"
            "            continue",
        ),
    ),
    "events_repeat": _mutant(
        "test_the_same_event_id_is_committed_once",
        ("store.session_aggregate", "SessionAggregate.append", "if id_ not in known", ""),
    ),
    "nobody_is_told": _mutant(
        "test_a_decision_wakes_the_owner",
        ("store.base", "StoreBase._notify", "relay = self._backend.relay", "return"),
    ),
    "interrupted_calls_run": _mutant(
        "test_nothing_is_claimed_once_interrupted",
        ("store.owners", "OwnerRules.claim", "unit.session.interrupted", "False"),
        ("store.clients", "_interrupt", "await unit.supersede()", "pass"),
    ),
    "acknowledged_before_it_is_kept": _mutant(
        "test_the_edited_input_is_what_may_run",
        (
            "store.base",
            "StoreBase._writing",
            """await fault_points.reach(f"{point}.before_commit")
    except (StoreUnreachable, asyncio.CancelledError):
""",
            """if point == "send_events":
                raise InterruptedError
    except InterruptedError:
        pass
    except (StoreUnreachable, asyncio.CancelledError):
""",
        ),
    ),
    "idempotency_keys_are_forgotten": _mutant(
        "test_an_idempotency_key_repeats_the_reply",
        ("store.clients", "earlier_reply", "idempotency_key is None", "True"),
        ("store.clients", "remember_reply", "idempotency_key is not None", "False"),
    ),
    "what_waits_is_deleted": _mutant(
        "test_what_waits_is_never_too_old",
        (
            "store.supervision",
            "_rests",
            "session.lease is not None or session.updated_at >= before",
            "True:\n        return True\n    if False",
        ),
    ),
    "what_failed_is_recorded": _mutant(
        "test_a_decision_and_its_entry_in_the_audit_log_are_committed_together",
        (
            "store.base",
            "StoreBase._writing",
            """yield tx
            told = await post(tx)
            await append(tx, self._signer)
            await fault_points.reach(f"{point}.before_commit")
    except (StoreUnreachable, asyncio.CancelledError):
        if changed:  # whether they were kept is not known
            self._approvals.forget()
            self._signals.notify(APPROVALS)
        if told:
            self._notify(NOTICES)
        raise
""",
            """drafts = tx.drafts
            yield tx
            await fault_points.reach(f"{point}.before_commit")
    finally:
        async with self._backend.begin(write=True) as later:
            later.drafts.extend(drafts)
            await append(later, self._signer)
""",
        ),
    ),
    "chains_fork": _mutant(
        "test_a_decision_and_its_entry_in_the_audit_log_are_committed_together",
        ("store.recording", "append", "await tx.audit_head(workspace_id)", "Head()"),
    ),
    "one_person_is_two": _mutant(
        "test_a_person_counts_once_however_often_and_with_whatever_key",
        (
            "store.votes",
            "agree",
            "missing = poll.missing({by.principal_id, *(vote.principal_id for vote in others)})",
            "missing = poll.missing([by.principal_id, *(vote.principal_id for vote in poll.votes())])",
        ),
        (
            "domain.policy.tiers",
            "unmet",
            "people = {person.id: person for person in voters}",
            "people = dict(enumerate(voters))",
        ),
    ),
    "epochs_are_not_raised": _mutant(
        "test_an_owner_that_is_replaced_hears_of_it",
        ("store.session_aggregate", "SessionAggregate.lease", "self.session.epoch + 1", "self.session.epoch"),
    ),
}


def changed_code(change: Change, module: ModuleType) -> tuple[FunctionType, CodeType]:
    """Returns the function whose source is changed, and its changed code. Setting the code changes the function for every
    module that imported it."""
    found: Any = module
    for name in change.name.split("."):
        found = getattr(found, name)
    source = textwrap.dedent(inspect.getsource(found))
    if source.count(change.old) != 1:
        raise AssertionError(f"{change.old!r} is not once in {change.module}.{change.name}")
    made: dict[str, Any] = {}
    exec(compile(source.replace(change.old, change.new), f"<{change.name}>", "exec"), vars(module), made)
    [function] = made.values()
    return inspect.unwrap(found), inspect.unwrap(function).__code__


def code_changes(name: str) -> list[tuple[FunctionType, CodeType]]:
    """Returns the functions that a mutant changes, with their changed code. Imports their modules."""
    return [
        changed_code(change, importlib.import_module(f"{PACKAGE}.{change.module}"))
        for change in MUTANTS[name].changes
    ]


def install(names: Iterable[str], module: ModuleType) -> None:
    """Applies those changes of these mutants that concern a module which was just imported, in this process."""
    for change in (change for name in names for change in MUTANTS[name].changes):
        if f"{PACKAGE}.{change.module}" == module.__name__:
            function, function.__code__ = changed_code(change, module)
