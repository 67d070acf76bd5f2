"""What a build did: build_report.json for programs, build_report.md for people."""

from collections import Counter

from data_prep.decontaminate import STAGES
from data_prep.ledger import Ledger

KEPT, DROPPED = "kept: ", "dropped: "


def report(
    settings: dict, inputs: list[dict], ledger: Ledger, files: dict[str, dict], processed: dict
) -> dict:
    """Everything but times and machines, so that the same build gives the same report.

    Args:
        files: Path → rows and sha256.
        processed: Source → its rows in the training pool's three files.
    """
    total = sum(processed.values())
    return {
        "schema_version": 1,
        "settings": settings,
        "inputs": inputs,
        "sources": {source: _source(ledger, source) for source in ledger.accounts},
        "shares": {source: round(rows / total, 4) for source, rows in processed.items() if total},
        "files": files,
        "notes": ledger.notes,
        "examples": ledger.examples,
        "bad_rows": ledger.bad_rows,
    }


def _source(ledger: Ledger, source: str) -> dict:
    splits = ledger.counts(source)
    fates: Counter[str] = Counter()
    for counts in splits.values():
        fates.update(counts)
    groups = {group: _sum(fates, prefix) for group, prefix in GROUPS.items()}
    groups["other reasons"] = _sum(fates, DROPPED) - sum(groups[g] for g in list(GROUPS)[1:4])
    stages = {stage: fates[f"{DROPPED}contaminated: {stage}"] for stage in STAGES}
    return {"read": fates.total(), **groups, "contaminated_by_stage": stages, "splits": splits}


GROUPS = {
    "kept": KEPT,
    "contaminated": f"{DROPPED}contaminated: ",
    "duplicate": f"{DROPPED}duplicate: ",
    "not convertible": f"{DROPPED}cannot be converted: ",
    "left out": "left out: ",
    "invalid": "invalid",
}


def _sum(fates: Counter, prefix: str) -> int:
    return sum(count for fate, count in fates.items() if fate.startswith(prefix))


def markdown(report: dict) -> str:
    """The report as a page."""
    columns = ["read", *GROUPS, "other reasons"]
    summary = [
        [name, *(f"{source[c]:,}" for c in columns)] for name, source in report["sources"].items()
    ]
    parts = ["# Build report", *(f"- {note}" for note in report["notes"])]
    parts += ["## Rows", _table(["dataset", *columns], summary)]
    parts += [
        "Read is the sum of the other columns. Kept counts each row once, wherever it went; the same by "
        "split and fate:"
    ]
    fates = [
        [name, split, fate, f"{count:,}"]
        for name, source in report["sources"].items()
        for split, counts in source["splits"].items()
        for fate, count in counts.items()
    ]
    parts.append(_table(["dataset", "split", "fate", "rows"], fates))
    stages = [
        [name, *(f"{source['contaminated_by_stage'][s]:,}" for s in STAGES)]
        for name, source in report["sources"].items()
    ]
    parts += ["## Contamination by stage", _table(["dataset", *STAGES], stages)]
    shares = [[name, f"{share:.1%}"] for name, share in report["shares"].items()]
    parts += ["## Shares of the training pool", _table(["dataset", "share"], shares)]
    files = [[f"`{p}`", f"{f['rows']:,}", f"`{f['sha256']}`"] for p, f in report["files"].items()]
    parts += ["## Files", _table(["file", "rows", "sha256"], files)]
    parts += ["## Examples of what was dropped", *map(_examples, report["examples"].items())]
    if report["bad_rows"]:
        parts += ["## Rows that cannot be used", *(f"- {row}" for row in report["bad_rows"])]
    return "\n\n".join(_joined(parts)) + "\n"


def _joined(parts: list[str]) -> list[str]:
    """Items of a list directly below one another, everything else a paragraph apart."""
    result: list[str] = []
    for part in parts:
        if result and part.startswith("- ") and result[-1].startswith("- "):
            result[-1] += f"\n{part}"
        else:
            result.append(part)
    return result


def _examples(item: tuple[str, list[dict]]) -> str:
    reason, rows = item
    shown = "\n".join(f"  - {_shown(row)}" for row in rows)
    return f"- {reason}\n{shown}"


def _shown(row: dict[str, str]) -> str:
    text = "; ".join(f"{key}: {' '.join(str(value).split())}" for key, value in row.items())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
