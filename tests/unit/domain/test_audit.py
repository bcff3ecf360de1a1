"""Every kind of tampering with an export of the audit log is found and named by the entry's number."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.domain.audit import Draft, Entry, Head, seal
from claude_hitl_template.domain.audit.canonical import canonical, plain
from claude_hitl_template.domain.audit.checkpoints import checkpoint, export_end
from claude_hitl_template.domain.audit.entries import GENESIS, hash_of
from claude_hitl_template.domain.audit.receipts import receipt, verify_receipt
from claude_hitl_template.domain.audit.signing import Signer, keys_of_jwks, read_keys
from claude_hitl_template.domain.audit.verification import Report, verify
from claude_hitl_template.domain.people import Actor
from claude_hitl_template.errors import InvalidInput

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
SIGNER, OTHER = Signer.generate(), Signer.generate()
KEYS = keys_of_jwks(SIGNER.jwk)
EVERY = 4

type Documents = list[dict[str, Any]]


def draft(number: int, workspace_id: str = "wrkspc_1", **details: Any) -> Draft:
    actor = Actor(name="Zoë", principal_id="prin_1", key_id="key_1")
    at = NOON + timedelta(seconds=number)
    return Draft(
        workspace_id, "approval.decided", actor, f"appr_{number}", {"result": "allow", **details}, at
    )


def chained(drafts: Sequence[Draft], head: Head | None = None) -> list[Entry]:
    entries, head = list[Entry](), head or Head()
    for one in drafts:
        entries.append(seal(one, head))
        head = Head(entries[-1].seq, entries[-1].hash)
    return entries


def exported(entries: Sequence[Entry], signer: Signer = SIGNER) -> Documents:
    found: Documents = []
    for entry in entries:
        found.append(entry.wire())
        if entry.seq % EVERY == 0:
            found.append(checkpoint(signer, entry.workspace_id, Head(entry.seq, entry.hash), entry.time))
    return [*found, export_end(signer, entries[0], entries[-1], NOON)]


def judged(documents: Documents) -> Report:
    return verify([json.dumps(document) for document in documents], KEYS)


def found_in(documents: Documents) -> list[tuple[str, int | None]]:
    return [(problem.kind, problem.seq) for problem in judged(documents).problems]


def at(documents: Documents, seq: int) -> int:
    return next(i for i, one in enumerate(documents) if one["type"] == "audit_entry" and one["seq"] == seq)


@pytest.fixture
def documents() -> Documents:
    return exported(chained([draft(number) for number in range(1, 11)]))


def test_an_untouched_export_is_whole(documents: Documents):
    report = judged(documents)
    assert report.problems == ()
    assert (report.workspace_id, report.entries, report.checkpoints) == ("wrkspc_1", 10, 3)
    assert (report.from_seq, report.to_seq, report.signed_at) == (1, 10, "2030-01-01T12:00:00Z")


def test_without_a_key_the_one_that_the_export_names_counts(documents: Documents):
    report = verify([json.dumps(document) for document in documents], None)
    assert (report.problems, report.key_id) == ((), SIGNER.jwk["kid"])
    documents[-1]["public_key"] = OTHER.jwk
    assert ("other_key", 10) in [(p.kind, p.seq) for p in verify(map(json.dumps, documents), None).problems]


def test_an_export_of_a_later_part_is_whole():
    entries = chained([draft(number) for number in range(1, 11)])[6:]
    report = judged(exported(entries))
    assert report.problems == ()
    assert (report.from_seq, report.to_seq) == (7, 10)


def rehashed(documents: Documents, start: int, change: Callable[[dict[str, Any]], None]) -> Documents:
    """What someone with the database, and without the key, can do: the hashes from an entry on are made again."""
    previous = documents[at(documents, start - 1)]["hash"]
    for document in documents[at(documents, start) :]:
        if document["type"] == "audit_entry":
            if document["seq"] == start:
                change(document)
            document["previous"] = previous
            document["hash"] = previous = hash_of(document)
    return documents


def deny(entry: dict[str, Any]) -> None:
    entry["details"]["result"] = "deny"


@pytest.mark.parametrize("name", ["time", "actor", "action", "target", "details", "previous"])
def test_a_changed_field_is_found(documents: Documents, name: str):
    entry = documents[at(documents, 5)]
    entry[name] = {**entry[name], "name": "Mallory"} if isinstance(entry[name], dict) else f"{entry[name]}0"
    assert ("changed", 5) in found_in(documents)


def test_a_changed_entry_with_its_hash_made_again_is_found(documents: Documents):
    entry = documents[at(documents, 5)]
    deny(entry)
    entry["hash"] = hash_of(entry)
    assert found_in(documents) == [("unlinked", 6)]


def test_a_chain_that_was_made_again_has_no_valid_signature(documents: Documents):
    assert found_in(rehashed(documents, 5, deny)) == [("rebuilt", 8), ("rebuilt", 10)]


def test_a_chain_that_was_made_again_and_signed_with_another_key_is_found():
    entries = chained([draft(number) for number in range(1, 11)])
    assert found_in(exported(entries, OTHER)) == [("other_key", 4), ("other_key", 8), ("other_key", 10)]


def test_dropped_entries_are_found(documents: Documents):
    del documents[at(documents, 5)]
    assert found_in(documents) == [("missing", 5)]
    del documents[at(documents, 6)]
    [problem] = judged(documents).problems
    assert str(problem) == "entry 5 and those up to 6 are missing"


def test_a_dropped_entry_whose_number_another_one_took_is_found(documents: Documents):
    del documents[at(documents, 5)]
    for document in documents:
        if document["type"] == "audit_entry" and document["seq"] > 5:
            document["seq"] -= 1
    assert found_in(rehashed(documents, 5, lambda _: None)) == [("rebuilt", 8), ("missing", 10)]


def test_dropped_first_entries_are_found(documents: Documents):
    assert found_in(documents[2:]) == [("missing", 1)]


def test_reordered_entries_are_found(documents: Documents):
    five, six = at(documents, 5), at(documents, 6)
    documents[five], documents[six] = documents[six], documents[five]
    assert found_in(documents) == [("out_of_order", 5)]


def test_the_first_entries_reordered_are_found(documents: Documents):
    documents[0], documents[2] = documents[2], documents[0]
    assert found_in(documents) == [("out_of_order", 1), ("out_of_order", 2)]


@pytest.mark.parametrize("kept", range(1, 12))
def test_an_export_that_is_cut_off_is_found(documents: Documents, kept: int):
    """Wherever it ends, also right after a checkpoint."""
    cut = documents[:kept]
    last = max(document["seq"] for document in cut)
    assert found_in(cut) == [("truncated", last)]


def test_entries_dropped_before_the_end_are_found(documents: Documents):
    del documents[-3:-1]
    assert [str(problem) for problem in judged(documents).problems] == [
        "entry 9 and those up to 10 are missing"
    ]


def test_an_empty_file_is_found():
    assert found_in([]) == [("truncated", None)]


def test_an_end_of_a_shorter_export_is_found(documents: Documents):
    entries = chained([draft(number) for number in range(1, 11)])
    earlier = export_end(SIGNER, entries[0], entries[7], NOON)
    assert found_in([*documents[:-1], earlier]) == [("after_end", 9)]


def test_a_forked_chain_is_found(documents: Documents):
    head = documents[at(documents, 4)]
    [other] = chained([draft(5, note="another")], Head(4, head["hash"]))
    documents.insert(at(documents, 6), other.wire())
    assert found_in(documents) == [("forked", 5)]


def test_an_inserted_entry_is_found(documents: Documents):
    """Its own hash and its link are right: only the entry that followed before shows it."""
    head = documents[at(documents, 10)]
    [more] = chained([draft(11)], Head(10, head["hash"]))
    documents.insert(-1, more.wire())
    assert found_in(documents) == [("after_end", 11)]


def test_an_entry_that_is_there_twice_is_found(documents: Documents):
    documents.insert(3, documents[at(documents, 2)])
    assert found_in(documents) == [("repeated", 2)]


def test_an_entry_of_another_workspace_is_found(documents: Documents):
    [other] = chained([draft(5, "wrkspc_2")], Head(4, documents[at(documents, 4)]["hash"]))
    documents[at(documents, 5)] = other.wire()
    assert found_in(documents) == [("other_workspace", 5), ("missing", 5)]


def test_a_checkpoint_of_another_workspace_is_found(documents: Documents):
    stranger = exported(chained([draft(number, "wrkspc_2") for number in range(1, 11)]))
    documents[-1] = stranger[-1]
    assert found_in(documents) == [("other_workspace", 10), ("truncated", 10)]


def test_a_checkpoint_of_another_entry_is_found(documents: Documents):
    first = next(document for document in documents if document["type"] == "audit_checkpoint")
    first["seq"] = 3
    assert found_in(documents) == [("bad_signature", 3)]


def test_a_checkpoint_does_not_pass_for_the_end_of_an_export(documents: Documents):
    cut = documents[: at(documents, 5)]
    last = cut[-1]
    cut[-1] = {**last, "type": "audit_export_end", "from_seq": 1, "previous": GENESIS}
    assert found_in(cut) == [("bad_signature", 4)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "x",
        "[]",
        "{}",
        "NaN",
        '{"type": "audit_entry"}',
        "[" * 100_000,
        '{"type": "audit_checkpoint", "type": "audit_checkpoint"}',
    ],
)
def test_a_line_that_is_not_an_entry_is_found(documents: Documents, line: str):
    lines = [json.dumps(document) for document in documents]
    [problem] = verify([*lines[:3], line, *lines[3:]], KEYS).problems
    assert problem.kind == "malformed"
    assert "line 4" in str(problem)


@pytest.mark.parametrize("change", [{"note": "added"}, {"seq": "5"}, {"seq": True}, {"details": None}])
def test_an_entry_of_another_form_is_found(documents: Documents, change: dict[str, Any]):
    documents[at(documents, 5)].update(change)
    kinds = [kind for kind, _ in found_in(documents)]
    assert "malformed" in kinds


def test_a_key_that_is_there_twice_is_found(documents: Documents):
    lines = [json.dumps(document) for document in documents]
    lines[2] = lines[2].replace('"result": "allow"', '"result": "deny", "result": "allow"')
    assert [problem.kind for problem in verify(lines, KEYS).problems] == ["missing", "malformed"]


def test_text_without_utf_8_is_found(documents: Documents):
    documents[at(documents, 5)]["details"]["note"] = "\ud800"
    assert ("changed", 5) in found_in(documents)


_texts = st.text(st.characters(exclude_categories=["Cs"]))
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=10,
)


@given(_values)
def test_canonical_json_is_that_of_rfc_8785(value: Any):
    assert canonical(value) == rfc8785.dumps(value)
    assert plain(value) == value


@given(st.dictionaries(st.text(), st.text() | st.lists(st.text())), st.text())
def test_whatever_text_is_recorded_can_be_verified(details: dict[str, Any], name: str):
    one = Draft("wrkspc_1", "sign_in.failed", Actor(name=name), name, details, NOON)
    documents = exported([seal(one, Head())])
    assert judged(documents).problems == ()


@pytest.mark.parametrize("value", [0.5, float("nan"), 2**53, b"bytes", {1, 2}, NOON])
def test_what_has_no_canonical_form_is_not_recorded(value: Any):
    with pytest.raises(TypeError):
        seal(draft(1, value=value), Head())


def test_the_public_key_is_read_as_it_is_published():
    published = {"keys": [SIGNER.jwk]}
    assert set(read_keys(json.dumps(published))) == set(read_keys(json.dumps(SIGNER.jwk))) == set(KEYS)
    assert Signer.of_pem(SIGNER.pem()).jwk == SIGNER.jwk


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"keys": [1]}', '{"keys": 1}', "-----BEGIN PUBLIC KEY-----", "{"]
)
def test_a_file_without_a_public_key_is_refused(text: str):
    with pytest.raises(InvalidInput, match="--key"):
        read_keys(text)


def test_the_signing_key_stays_in_its_process():
    assert "PRIVATE" not in repr(SIGNER)
    with pytest.raises(TypeError):
        SIGNER.__reduce__()


# -- an earlier export of the same log


def compared(documents: Documents, earlier: Documents) -> list[tuple[str, int | None]]:
    report = verify(map(json.dumps, documents), KEYS, earlier=map(json.dumps, earlier))
    return [(problem.kind, problem.seq) for problem in report.problems]


def test_a_log_continues_an_earlier_export(documents: Documents):
    entries = chained([draft(number) for number in range(1, 11)])
    assert compared(documents, exported(entries[:6])) == []
    assert compared(exported(entries[7:]), exported(entries[:9])) == []


def test_a_log_that_was_made_again_since_is_found_even_if_it_was_signed():
    before = exported(chained([draft(number) for number in range(1, 7)]))
    again = exported(chained([draft(number, note="another") for number in range(1, 11)]))
    assert compared(again, before) == [("rebuilt", 4), ("rebuilt", 6)]


def test_a_log_that_lost_entries_since_is_found():
    entries = chained([draft(number) for number in range(1, 11)])
    assert compared(exported(entries[:7]), exported(entries)) == [("missing", 8), ("missing", 10)]


def test_an_earlier_export_of_another_workspace_key_or_form_is_found(documents: Documents):
    entries = chained([draft(number, "wrkspc_2") for number in range(1, 4)])
    assert compared(documents, exported(entries)) == [("other_workspace", 3)]
    assert compared(documents, exported(chained([draft(1)]), OTHER)) == [("bad_signature", 1)]
    assert compared(documents, [{"type": "audit_checkpoint"}]) == [("malformed", None)]
    report = verify(map(json.dumps, documents), KEYS, earlier=["no JSON"])
    assert [problem.kind for problem in report.problems] == ["malformed"]


# -- how much work it is


def calls_to_verify(lines: list[str]) -> int:
    """Calls of functions, those of C included, which a busy machine does not change."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        verify(lines, KEYS)
    finally:
        sys.setprofile(None)
    return count


def test_the_work_grows_as_the_entries_do():
    lines = [json.dumps(one) for one in exported(chained([draft(number) for number in range(1, 2001)]))]
    assert calls_to_verify(lines) <= 2.1 * calls_to_verify(
        lines[:1250]
    )  # 1,000 entries, and their checkpoints


@pytest.mark.slow
def test_a_hundred_thousand_entries_are_verified():
    documents = exported(chained([draft(number) for number in range(1, 100_001)]))
    report = judged(documents)
    assert (report.problems, report.entries) == ((), 100_000)
    del documents[at(documents, 77_777)]
    assert found_in(documents) == [("missing", 77_777)]


# -- receipts


@pytest.fixture
def proof() -> dict[str, Any]:
    return json.loads(json.dumps(receipt(SIGNER, chained([draft(1, digest="a" * 64)]), NOON)))


def test_a_receipt_verifies_by_itself_and_with_the_key(proof: dict[str, Any]):
    assert verify_receipt(proof, None) == verify_receipt(proof, KEYS) == ()
    assert proof["decision"]["actor"]["name"] == "Zoë"
    assert proof["decision"]["details"] == {"result": "allow", "digest": "a" * 64}


def test_a_changed_receipt_is_found(proof: dict[str, Any]):
    proof["entries"][0]["details"]["result"] = "deny"
    assert [problem.kind for problem in verify_receipt(proof, None)] == ["bad_signature"]


def test_a_receipt_of_another_key_is_found(proof: dict[str, Any]):
    others = keys_of_jwks(OTHER.jwk)
    assert [problem.kind for problem in verify_receipt(proof, others)] == ["other_key"]
    proof["public_key"] = OTHER.jwk
    assert [problem.kind for problem in verify_receipt(proof, None)] == ["other_key"]


@pytest.mark.parametrize("entries", [None, 1, [], [1], [{}], [{"type": "audit_entry"}]])
def test_a_signed_receipt_without_a_decision_is_refused(entries: Any):
    """Anyone can sign with a key of their own."""
    forged = OTHER.sign({"type": "approval_receipt", "entries": entries, "public_key": OTHER.jwk})
    assert [problem.kind for problem in verify_receipt(forged, None)] == ["malformed"]


@pytest.mark.parametrize(
    ("name", "value", "kind"), [("approval_id", "appr_2", "other_workspace"), ("decision", {}, "changed")]
)
def test_a_signed_receipt_that_says_other_than_its_entries_is_refused(
    proof: dict[str, Any], name: str, value: Any, kind: str
):
    unsigned = {key: proof[key] for key in proof if key not in ("key_id", "signature")}
    forged = OTHER.sign({**unsigned, name: value, "public_key": OTHER.jwk})
    assert [problem.kind for problem in verify_receipt(forged, None)] == [kind]


@pytest.mark.parametrize("document", [None, [], {}, {"type": "approval_receipt"}])
def test_what_is_not_a_receipt_is_refused(document: Any):
    assert len(verify_receipt(document, None)) == 1
