"""Numbers as a reader sees them, and tables of them. What a template shows, without any HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Form:
    """How a number is written.

    Args:
        digits: After the point.
        scale: Multiplies the number: 100 for a share that is shown in percent.
        unit: Stands behind the number.
        signed: A difference: + stands before what is positive.
    """

    digits: int = 3
    scale: float = 1.0
    unit: str = ""
    signed: bool = False

    def bare(self, value: float) -> str:
        """Without the unit."""
        text = f"{value * self.scale:{'+' if self.signed else ''},.{self.digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "−")

    def __call__(self, value: float) -> str:
        return self.bare(value) + self.unit


PLAIN = Form()
CHANGE = Form(signed=True)
PERCENT = Form(1, 100, "\u00a0%")
POINTS = Form(1, 100, "\u00a0points", signed=True)
COUNT = Form(0)
HUNDREDTHS = Form(2)


@dataclass(frozen=True)
class Mark:
    """One model's place in a picture from 0 to 1: a point with its interval."""

    who: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """A line from 0 to 1 with marks and, dashed, the floor."""

    marks: tuple[Mark, ...]
    floor: float | None
    label: str


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Args:
        text: What stands there.
        sort: What it is sorted by; None comes last.
        detail: Small print below: an interval, or why there is none.
        link: Set and outcome that the item browser shows for this number.
        href: Another page, by its path from this one.
    """

    text: str
    sort: float | str | None = None
    detail: str = ""
    link: tuple[str, str] | None = None
    chart: Chart | None = None
    href: str | None = None

    @property
    def is_number(self) -> bool:
        return self.chart is None and (isinstance(self.sort, int | float) or self.text == MISSING)


@dataclass(frozen=True)
class Table:
    """Cells under their columns' names.

    Args:
        columns: Names; none for pairs of a name and a value.
        caption: What the table is; of a folded one, what stands there until it is opened.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    folded: bool = False
    sortable: bool = True


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    anchor: str
    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def words(text: str, detail: str = "") -> Cell:
    return Cell(text, text.casefold(), detail)


def number(value: float | None, form: Form = PLAIN, link: tuple[str, str] | None = None) -> Cell:
    if value is None:
        return Cell(MISSING)
    return Cell(form(value), value, link=link)


def interval(estimate: dict, form: Form) -> str:
    """`[low, high]`, or why there is none."""
    bounds = estimate["interval_95"]
    if bounds is None:
        return estimate.get("note", "")
    low, high = bounds
    return f"[{form.bare(low)},\u00a0{form.bare(high)}]"


def estimated(estimate: dict | None, form: Form = PLAIN) -> Cell:
    """An estimate of the result: its value with the interval below it, or why there is none."""
    if estimate is None:
        return Cell(MISSING)
    if "skipped" in estimate:
        return Cell(MISSING, detail=estimate["skipped"])
    value = estimate["value"]
    text = MISSING if value is None else form(value)
    return Cell(text, value, interval(estimate, form))


def inline(estimate: dict, form: Form) -> str:
    """An estimate within a sentence."""
    if estimate["value"] is None:
        return MISSING
    if estimate["interval_95"] is None:
        return form(estimate["value"])
    return f"{form(estimate['value'])} {interval(estimate, form)}"


def p_value(p: float) -> str:
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}"


def accuracy_chart(subjects: dict[str, dict], floor: float | None, form: Form = PERCENT) -> Cell:
    """Both models' shares on one line.

    Args:
        subjects: Name → estimate; those without a value are left out.
    """
    marks = tuple(
        Mark(name, found["value"], *(found["interval_95"] or [found["value"]] * 2))
        for name, found in subjects.items()
        if found["value"] is not None
    )
    said = [f"{mark.who} {form(mark.value)}" for mark in marks]
    said += [] if floor is None else [f"floor {form(floor)}"]
    first = marks[0].value if marks else None
    return Cell("", first, chart=Chart(marks, floor, ", ".join(said)))


def listed(names: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = list(names)
    return f"{', '.join(first)} and {last}" if first else last
