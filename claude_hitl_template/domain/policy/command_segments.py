"""Which simple command of a command line asks, and why; and the rules that grant one of them."""

from collections.abc import Callable, Sequence

from claude_hitl_template.domain.frozen import Frozen
from claude_hitl_template.domain.policy.bash import Segment, segments
from claude_hitl_template.domain.policy.evaluation import Evaluation, Verdict
from claude_hitl_template.domain.policy.floor import STRICTNESS, strictest
from claude_hitl_template.domain.policy.lines import parts
from claude_hitl_template.domain.policy.rules import Rule, bash_pattern, parse_rule

MOST = 50  # segments that an approval lists
MOST_JUDGED = 200


class JudgedSegment(Frozen):
    """A simple command of a line: its place in the text (characters), its verdict, and the rule that decided ("default":
    none did)."""

    start: int
    end: int
    verdict: Verdict
    source: str

    def text(self, command: str) -> str:
        return command[self.start : self.end]


def judged_segments(
    command: str, found: Sequence[Evaluation], judge: Callable[[str], Evaluation]
) -> tuple[JudgedSegment, ...]:
    """How each simple command of a line is judged.

    Args:
        command: the line.
        found: how the whole line was judged, by each policy.
        judge: judges one command of it as if it were alone.

    Returns:
        The commands in their order, those in substitutions after the one that has them. () for a line that is one command,
        is not understood, or is more than MOST_JUDGED. Of more than MOST only those that ask or are denied, at most MOST.
    """
    places = segments(command)
    if not 2 <= len(places) <= MOST_JUDGED:
        return ()
    guarded = [(whole, set(_guarded(command, whole.rule))) for whole in found]
    judged = [_judged(place, judge(place.text), guarded) for place in places]
    whole = strictest(*found)
    if all(STRICTNESS[one.verdict] < STRICTNESS[whole.verdict] for one in judged):
        # Only the line as a whole asks.
        judged = [one.but(verdict=whole.verdict, source=whole.source) for one in judged]
    if len(judged) > MOST:
        judged = [one for one in judged if one.verdict is not Verdict.allow][:MOST]
    return tuple(judged)


def _judged(
    place: Segment, alone: Evaluation, guarded: Sequence[tuple[Evaluation, set[Segment]]]
) -> JudgedSegment:
    named = [whole for whole, places in guarded if place in places]
    decided = strictest(alone, *named)
    return JudgedSegment(start=place.start, end=place.end, verdict=decided.verdict, source=decided.source)


def _guarded(command: str, rule: Rule | None) -> list[Segment]:
    """The commands that a rule asks for or denies, also where only the rest of the line makes them so."""
    if rule is None or rule.digest is not None:
        return []
    tool, spec = parse_rule(rule.rule)
    if tool != "Bash" or spec is None:
        return []
    return segments(command, bash_pattern(spec, allows=False)[0])


def asking(judged: Sequence[JudgedSegment], command: str) -> list[str]:
    """The commands of a line that ask and that a rule can grant, without redirections that only discard output."""
    asked = {(one.start, one.end) for one in judged if one.verdict is Verdict.ask}
    return list(dict.fromkeys(part.command for part in parts(command) if (part.start, part.end) in asked))
