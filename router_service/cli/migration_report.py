"""What `router-admin migrate` prints about a move, and what keeps it from being whole."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from router_service.cli.migration_moves import Ends, Move
from router_service.cli.output import table
from router_service.errors import shorten
from router_service.transfer import LayerCounts

# Hex digits of a checksum in a table; --json has them all.
_SHOWN_DIGITS = 16
_AGAIN = "run the same command again"


def document(move: Move) -> dict[str, Any]:
    """One memory's part of the JSON document. What a run did not come to is left out."""
    outcome, migration = move.outcome, move.migration
    layers = _layers(move)
    totals = ("added", "replaced", "deleted", "only_in_target")
    return {
        "memory": move.record.name,
        "as": move.as_name,
        "made": move.made,
        "changed_settings": move.changed_settings,
        **{name: sum(layer[name] for layer in layers) for name in totals},
        "passes": outcome.passes if outcome is not None else 0,
        "verified": outcome is not None and outcome.verified,
        "layers": layers if migration is not None else [],
    }


def render(console: Console, move: Move, *, dry_run: bool) -> None:
    """One memory's table."""
    rows = [list(row.values()) for row in map(_row, _layers(move))]
    columns = list(_row(_layers(move)[0]))
    moved = f"{move.record.name}" + (
        f" as {move.as_name}" if move.as_name != move.record.name else ""
    )
    state = "would be done" if dry_run else ("verified" if _verified(move) else "not verified")
    console.print(table(columns, rows, title=f"{moved}, {state}"))


def problem(ends: Ends, move: Move) -> str:
    """Why the target is not the source's equal, and what to do; "" when it is."""
    outcome, migration = move.outcome, move.migration
    if outcome is None or migration is None or outcome.verified:
        return ""
    where = f"memory {shorten(move.as_name)} in {shorten(ends.target_name.text)}"
    if outcome.changed_in_last_pass:
        return (
            f"{where}: {outcome.changed_in_last_pass} entries still changed in pass {outcome.passes}; {_AGAIN} when "
            "less is written to the source"
        )
    if migration.only_in_target:
        return (
            f"{where} holds {migration.only_in_target} entries that the source lacks ({_surplus(move)}); nothing of it "
            "was deleted: pass --delete to remove them, or --as NAME to make another memory"
        )
    return f"{where} is not the same as the source: {_unequal(move)}; {_AGAIN} while nobody writes to either"


def remarks(move: Move) -> list[str]:
    """What the user should know beside the counts."""
    told = []
    if move.changed_settings:
        names = ", ".join(move.changed_settings)
        told.append(f"{move.as_name}: settings brought from the source: {names}")
    refused = [index for index in move.indexes if index.refused]
    if refused:
        numbers = ", ".join(str(index.layer) for index in refused)
        first = refused[0]
        told.append(
            f"{move.as_name}: the target cannot have search keys {first.source.label} (layers {numbers}; "
            f"{first.refused}); they stay {first.target.label}"
        )
    return told


def _verified(move: Move) -> bool:
    return move.outcome is not None and move.outcome.verified


def _layers(move: Move) -> list[dict[str, Any]]:
    counts = move.migration.counts if move.migration is not None else {}
    layers = {number: {"layer": number, **asdict(found)} for number, found in counts.items()}
    for each in move.outcome.sums if move.outcome is not None else ():
        layers[each.layer] |= {
            "source": asdict(each.source),
            "target": asdict(each.target),
            "equal": each.equal,
        }
    for index in move.indexes:
        layers[index.layer] |= {
            "source_compression": index.source.label,
            "compression": index.target.label,
            "optimized": index.optimized,
        }
    return [layers[number] for number in sorted(layers)]


def _row(layer: dict[str, Any]) -> dict[str, object]:
    names = ("layer", *asdict(LayerCounts()))
    row: dict[str, object] = {name.replace("_", " "): layer[name] for name in names}
    if "equal" in layer:
        source, target = layer["source"], layer["target"]
        row |= {"source": source["entries"], "target": target["entries"]}
        row["sha256"] = _shown(source["sha256"])
        row["of target"] = "the same" if layer["equal"] else _shown(target["sha256"])
    if "compression" in layer:
        row["search keys"] = layer["compression"]
    return row


def _shown(digits: str) -> str:
    return f"{digits[:_SHOWN_DIGITS]}..."


def _surplus(move: Move) -> str:
    counts = move.migration.counts if move.migration is not None else {}
    return ", ".join(
        f"layer {number}: {found.only_in_target}"
        for number, found in sorted(counts.items())
        if found.only_in_target
    )


def _unequal(move: Move) -> str:
    sums = move.outcome.sums if move.outcome is not None else ()
    return ", ".join(
        f"layer {each.layer} has {each.source.entries} entries (sha256 {_shown(each.source.sha256)}) in the source and "
        f"{each.target.entries} ({_shown(each.target.sha256)}) in the target"
        for each in sums
        if not each.equal
    )
