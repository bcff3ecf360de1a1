"""Statistics of samples: percentiles, comparisons with a target, a table, JSON. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

type Compare = Literal["ratio of p50", "difference of p50", "p50", "p95", "p50, at least"]
_ABSENT = "-"
_BOTH = ("ratio of p50", "difference of p50")


@dataclass
class Measure:
    """One thing measured. Samples of `ours` and `bare` are in `unit`.

    `compare` says which figure is held against `target`: the most that it should be, or the least ("at least"). A ratio has
    no unit, the other figures have the samples'.
    """

    name: str
    unit: str
    compare: Compare | None = None
    target: float | None = None
    ours: list[float] = field(default_factory=list[float])
    bare: list[float] = field(default_factory=list[float])

    @property
    def figure(self) -> float | None:
        """The compared figure; None if a side that it needs has no samples."""
        if self.compare is None or not self.ours or (self.compare in _BOTH and not self.bare):
            return None
        ours = percentile(self.ours, 95 if self.compare == "p95" else 50)
        if self.compare == "ratio of p50":
            return ours / percentile(self.bare, 50)
        if self.compare == "difference of p50":
            return ours - percentile(self.bare, 50)
        return ours

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without a target or a figure."""
        if self.target is None or self.figure is None:
            return None
        return self.figure >= self.target if self.compare == "p50, at least" else self.figure <= self.target

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": summary(self.ours),
            "bare": summary(self.bare),
            "compare": self.compare,
            "figure": _rounded(self.figure),
            "target": self.target,
            "met": self.met,
        }


def percentile(samples: Sequence[float], share: float) -> float:
    """The `share`-th percentile (0 to 100), linear between neighbours. Raises ValueError without samples."""
    if not samples:
        raise ValueError("there are no samples")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * share / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(samples: Sequence[float]) -> dict[str, Any] | None:
    """None without samples."""
    if not samples:
        return None
    return {
        "p50": _rounded(percentile(samples, 50)),
        "p95": _rounded(percentile(samples, 95)),
        "samples": [_rounded(s) for s in samples],
    }


def table(measures: Iterable[Measure], earlier: Mapping[str, float] | None = None) -> Table:
    """`earlier`: the p50 of another run's `ours` by name of the measure; the table then has the ratio to it."""
    made = Table(
        title="p50 / p95; `bare` is the SDK alone, same CLI, same model endpoint", title_justify="left"
    )
    for name in ("measure", "unit"):
        made.add_column(name)
    for name in ("n", "ours", "bare", "compared", "target"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("met")
    if earlier is not None:
        made.add_column("to earlier", justify="right", no_wrap=True)
    for measure in measures:
        made.add_row(*row(measure), *([] if earlier is None else [_to_earlier(measure, earlier)]))
    return made


def p50_by_name(run: Mapping[str, Any]) -> dict[str, float]:
    """The p50 of `ours` of each measure in the JSON of a run, for `table`. Raises ValueError for any other JSON."""
    try:
        return {one["name"]: float(one["ours"]["p50"]) for one in run["measures"] if one["ours"]}
    except (KeyError, TypeError) as error:
        raise ValueError("this is not the JSON of a run of the benchmark") from error


def _to_earlier(measure: Measure, earlier: Mapping[str, float]) -> str:
    before = earlier.get(measure.name)
    if not before or not measure.ours:
        return _ABSENT
    return f"{percentile(measure.ours, 50) / before:.2f} x"


def row(measure: Measure) -> tuple[str, ...]:
    """The cells of one line of the table."""
    return (
        measure.name,
        measure.unit,
        str(len(measure.ours)),
        _shown(measure.ours),
        _shown(measure.bare),
        _compared(measure),
        _target(measure),
        {True: "yes", False: "NO", None: _ABSENT}[measure.met],
    )


def _shown(samples: Sequence[float]) -> str:
    if not samples:
        return _ABSENT
    if len(samples) == 1:
        return _number(samples[0])
    return f"{_number(percentile(samples, 50))} / {_number(percentile(samples, 95))}"


def _compared(measure: Measure) -> str:
    figure = measure.figure
    if figure is None:
        return _ABSENT
    match measure.compare:
        case "ratio of p50":
            return f"{figure:.2f} x"
        case "difference of p50":
            return f"{'+' if figure >= 0 else ''}{_number(figure)}"
        case "p95":
            return f"p95 {_number(figure)}"
        case _:
            return f"p50 {_number(figure)}"


def _target(measure: Measure) -> str:
    if measure.target is None:
        return _ABSENT
    sign = ">=" if measure.compare == "p50, at least" else "<="
    return f"{sign} {measure.target:g}{' x' if measure.compare == 'ratio of p50' else ''}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
