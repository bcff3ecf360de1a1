"""Verifies an export of an audit log, without the service: what was changed, dropped, moved, added or cut off, by seq."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from claude_hitl_template.domain.audit import signing
from claude_hitl_template.domain.audit.canonical import parse
from claude_hitl_template.domain.audit.checkpoints import CHECKPOINT, EXPORT_END
from claude_hitl_template.domain.audit.entries import GENESIS, Entry, hash_of

type Kind = Literal[
    "malformed",
    "changed",
    "unlinked",
    "missing",
    "out_of_order",
    "repeated",
    "forked",
    "other_workspace",
    "other_key",
    "bad_signature",
    "rebuilt",
    "truncated",
    "after_end",
]
_TYPES: Mapping[str, type] = {
    "workspace_id": str, "seq": int, "time": str, "actor": dict, "action": str, "target": str, "details": dict,
    "previous": str, "hash": str,
}  # fmt: skip
_SIGNED: Mapping[str, type] = {"workspace_id": str, "seq": int, "hash": str, "time": str}
_ENDED: Mapping[str, type] = {**_SIGNED, "from_seq": int, "previous": str}


@dataclass(frozen=True)
class Problem:
    """One finding, and the entry it is about; `message` continues its number. `seq` None: with the file, or with a line that
    is not an entry."""

    kind: Kind
    seq: int | None
    message: str

    def __str__(self) -> str:
        return self.message if self.seq is None else f"entry {self.seq} {self.message}"


@dataclass(frozen=True)
class Report:
    """The outcome. `entries` counts those of the chain, `checkpoints` the valid signatures. `from_seq`, `to_seq` and
    `signed_at` are what the signed end states, and `key_id` is the key that signed it; None without a valid one."""

    workspace_id: str | None
    entries: int
    checkpoints: int
    from_seq: int | None
    to_seq: int | None
    signed_at: str | None
    key_id: str | None
    problems: tuple[Problem, ...]


def verify(
    lines: Iterable[str | bytes], keys: signing.Keys | None, *, earlier: Iterable[str | bytes] = ()
) -> Report:
    """Verifies the lines of an export.

    Args:
        lines: JSON Lines as `GET /v1/audit/export` sends them.
        keys: the public keys that the signatures may be of. None: the one that the end of the export names itself, which
            shows that nothing was changed since it was signed, and not who signed it.
        earlier: the lines of an earlier export of the same log; its signatures must fit the log as it is now.
    """
    found = _Chain(keys)
    for line in earlier:
        found.take_earlier(line)
    for number, line in enumerate(lines, 1):
        found.take(number, line)
    return found.report()


@dataclass
class _Chain:
    keys: signing.Keys | None
    workspace_id: str | None = None
    hashes: dict[int, bytes] = field(default_factory=dict[int, bytes])
    first_previous: dict[int, str] = field(default_factory=dict[int, str])  # of the lowest seq
    lowest: int = 0
    highest: int = 0
    gaps: list[range] = field(default_factory=list[range])
    signed: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])  # with valid signatures
    earlier: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    unchecked: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    before: list[Mapping[str, Any]] = field(
        default_factory=list[Mapping[str, Any]]
    )  # of the earlier file, valid
    end: Mapping[str, Any] | None = None  # with a valid signature
    ended: bool = False
    problems: list[Problem] = field(default_factory=list[Problem])

    def take(self, number: int, line: str | bytes) -> None:
        try:
            document = parse(line)
        except (ValueError, RecursionError) as error:
            self._add("malformed", None, f"line {number} is not JSON of the audit log: {error}")
            return
        kind = document.get("type") if isinstance(document, dict) else None
        expected = {"audit_entry": _TYPES, CHECKPOINT: _SIGNED, EXPORT_END: _ENDED}.get(str(kind))
        if expected is None or not _has(document, expected):
            seq = document.get("seq") if isinstance(document, dict) else None
            if type(seq) is int:
                self._add("malformed", seq, f"is malformed (line {number})")
            else:
                self._add("malformed", None, f"line {number} is neither an entry nor a checkpoint")
            return
        if self.ended:
            self._add("after_end", document["seq"], f"follows the signed end of the export (line {number})")
        if self.workspace_id is None:
            self.workspace_id = document["workspace_id"]
        if document["workspace_id"] != self.workspace_id:
            what = "is" if kind == "audit_entry" else "has a checkpoint that is"
            other = f"{what} of another workspace, {document['workspace_id']!r:.100} (line {number})"
            self._add("other_workspace", document["seq"], other)
        elif kind == "audit_entry":
            self._entry(document)
        else:
            self.ended = self.ended or kind == EXPORT_END
            self.unchecked.append(document)

    def take_earlier(self, line: str | bytes) -> None:
        document: Any = None
        with suppress(ValueError, RecursionError):
            document = parse(line)
        kind = document.get("type") if isinstance(document, dict) else None
        if kind in (CHECKPOINT, EXPORT_END) and _has(document, _SIGNED):
            self.earlier.append(document)
        elif kind != "audit_entry":
            self._add("malformed", None, "the earlier file is not an export of an audit log")

    def report(self) -> Report:
        self._check_signatures()
        end = self.end
        for signed in (*self.signed, *self.before):
            known = self.hashes.get(signed["seq"])
            if known is not None and known != signed["hash"].encode("utf-8", "replace"):
                self._add("rebuilt", signed["seq"], _REBUILT.format(at=signed["time"]))
        if end is not None:
            self._check_end(end)
        elif not self.hashes:
            self._add("truncated", None, "the file has no entry")
        elif not self.ended:
            cut = "is the last one: the export is cut off behind it, because its signed end is missing"
            self._add("truncated", self.highest, cut)
        missing = [gap for gap in self.gaps if gap]
        vouched = (signed["seq"] for signed in (*self.signed, *self.before))
        missing += [range(seq, seq + 1) for seq in vouched if seq > self._last]
        for gap in missing:
            self._add("missing", gap[0], f"{_and_up_to(gap[-1], gap[0])} missing")
        problems = sorted(self.problems, key=lambda problem: (problem.seq is None, problem.seq or 0))
        return Report(
            workspace_id=self.workspace_id,
            entries=len(self.hashes),
            checkpoints=len(self.signed),
            from_seq=end["from_seq"] if end else None,
            to_seq=end["seq"] if end else None,
            signed_at=end["time"] if end else None,
            key_id=end["key_id"] if end else None,
            problems=tuple(problems),
        )

    @property
    def _last(self) -> int:
        """The last entry that is there, or that the signed end names."""
        return max(self.highest, self.end["seq"] if self.end else 0)

    def _entry(self, entry: Mapping[str, Any]) -> None:
        seq, claimed = entry["seq"], entry["hash"]
        if not _has_its_hash(entry):
            self._add("changed", seq, "was changed: its content does not have its hash")
        mark = claimed.encode("utf-8", "replace")
        known = self.hashes.get(seq)
        if known is not None:
            if known == mark:
                self._add("repeated", seq, "is in the file twice")
            else:
                self._add(
                    "forked", seq, "is there twice with different content: one was added, or the chain forks"
                )
            return
        self._place(seq)
        self.hashes[seq] = mark
        before = self.hashes.get(seq - 1)
        due = GENESIS.encode() if seq == 1 else before
        if due is not None and entry["previous"].encode("utf-8", "replace") != due:
            self._add(
                "unlinked", seq, f"does not follow entry {seq - 1}: one of the two was added or replaced"
            )
        if seq == self.lowest:
            self.first_previous = {seq: entry["previous"]}

    def _place(self, seq: int) -> None:
        if not self.hashes:
            self.lowest = self.highest = seq
        elif seq > self.highest:
            if seq > self.highest + 1:
                self.gaps.append(range(self.highest + 1, seq))
            self.highest = seq
        else:
            self._add("out_of_order", seq, "is not in its place: it follows a later entry")
            if seq < self.lowest:
                if seq + 1 < self.lowest:
                    self.gaps.append(range(seq + 1, self.lowest))
                self.lowest = seq
            self.gaps = [part for gap in self.gaps for part in _without(gap, seq)]

    def _check_signatures(self) -> None:
        keys = self.keys
        if keys is None:
            ends = [signed for signed in self.unchecked if signed["type"] == EXPORT_END]
            keys = _named_key(ends[-1]) if ends else {}
        for signed in self.unchecked:
            try:
                signing.check(signed, keys)
            except signing.UnknownKey as error:
                self._add("other_key", signed["seq"], f"has a checkpoint that does not count: {error}")
            except signing.BadSignature as error:
                self._add(
                    "bad_signature", signed["seq"], f"has a checkpoint that is forged or was changed: {error}"
                )
            else:
                self.signed.append(signed)
                if signed["type"] == EXPORT_END:
                    self.end = signed
        for signed in self.earlier:
            if signed["workspace_id"] != self.workspace_id:
                self._add("other_workspace", signed["seq"], "was signed before, and for another workspace")
                continue
            try:
                signing.check(signed, keys)
            except ValueError as error:
                self._add(
                    "bad_signature", signed["seq"], f"has no valid signature in the earlier file: {error}"
                )
            else:
                self.before.append(signed)

    def _check_end(self, end: Mapping[str, Any]) -> None:
        if end["from_seq"] < self.lowest or not self.hashes:
            upper = self.lowest if self.hashes else end["seq"] + 1
            self.gaps.insert(0, range(end["from_seq"], upper))
        if self.hashes and end["seq"] > self.highest:
            self.gaps.append(range(self.highest + 1, end["seq"] + 1))
        for seq in sorted(self.hashes):
            if end["from_seq"] <= seq:
                break
            self._add("after_end", seq, "is outside of the range that was exported and signed")
        if self.highest > end["seq"]:
            self._add(
                "after_end",
                end["seq"] + 1,
                f"{_and_up_to(self.highest, end['seq'] + 1)} behind the signed end",
            )
        if self.first_previous.get(end["from_seq"], end["previous"]) != end["previous"]:
            self._add("rebuilt", end["from_seq"], _REBUILT.format(at=end["time"]))

    def _add(self, kind: Kind, seq: int | None, message: str) -> None:
        self.problems.append(Problem(kind, seq, message))


_REBUILT = (
    "has another hash than the service signed at {at}: it, or an entry before it, was changed, and the hashes from "
    "there on were made again"
)


def _has(document: Mapping[str, Any], expected: Mapping[str, type]) -> bool:
    """An entry has exactly these fields and `type`; a signed document has those of a signature, too."""
    if any(type(document.get(name)) is not kind for name, kind in expected.items()):
        return False
    return expected is not _TYPES or len(document) == len(Entry.model_fields)


def _has_its_hash(entry: Mapping[str, Any]) -> bool:
    try:
        return hash_of(entry) == entry["hash"]
    except ValueError:  # no canonical JSON, which no entry of the service has
        return False


def _without(gap: range, seq: int) -> list[range]:
    return (
        [part for part in (range(gap.start, seq), range(seq + 1, gap.stop)) if part] if seq in gap else [gap]
    )


def _named_key(end: Mapping[str, Any]) -> signing.Keys:
    try:
        return signing.keys_of_jwks(end.get("public_key"))
    except ValueError:
        return {}


def _and_up_to(last: int, first: int) -> str:
    return "is" if last == first else f"and those up to {last} are"
