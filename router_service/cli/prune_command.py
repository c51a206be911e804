"""`router-admin prune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from knnmoe.v1 import retention_pb2 as pb
from rich.console import Console

from router_service.cli import prune_options as flags
from router_service.cli.admin_errors import BadInput
from router_service.cli.admin_options import MemoryName
from router_service.cli.admin_output import plain, table
from router_service.cli.admin_session import Session, session_of
from router_service.cli.confirmation import confirm
from router_service.cli.operation_stream import followed

_NOTHING = (
    "say what goes: --forget, --older-than, --unused-below, --gain-below, --strength-below, --disagreeing-below, "
    "--near-duplicates, or --max-entries with --by"
)


def prune(
    context: typer.Context,
    name: MemoryName,
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[/EXAMPLE]",
            help="Entries of this source, or of one of its examples; repeat it for more, "
            "e.g. --forget genesis.txt. `delete` names sources with a slash.",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE|TIME",
            help="Entries made longer ago than 30d (also s, m, h, w), or before 2026-01-31T12:00 (UTC), "
            "e.g. --older-than 30d.",
        ),
    ] = None,
    unused_below: Annotated[
        int | None,
        typer.Option(min=0, help="Entries that were retrieved fewer times than this, e.g. 1."),
    ] = None,
    spare_newer_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE|TIME",
            help="Entries made since then are not dropped for lack of use, e.g. 7d.",
        ),
    ] = None,
    gain_below: Annotated[
        float | None,
        typer.Option(help="Entries that saved fewer nats than this when they were made, e.g. 0."),
    ] = None,
    strength_below: Annotated[
        float | None,
        typer.Option(
            help="Entries that hardly move routing: norm of the logit deltas, or half the L1 distance of the "
            "assignment to the uniform one, e.g. 0.05."
        ),
    ] = None,
    disagreeing_below: Annotated[
        float | None,
        typer.Option(
            help="Entries that contradict their neighbours from other examples: cosine of the deltas, or overlap "
            "of the assignments, below this, e.g. 0."
        ),
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            metavar="SIMILARITY",
            help="Of entries with keys this similar, and values that agree, the best one stays, e.g. 0.98.",
        ),
    ] = None,
    value_agreement: Annotated[
        float | None,
        typer.Option(
            help="Cosine or overlap of the values of near-duplicates; 0.9 when not given, e.g. 0.95."
        ),
    ] = None,
    max_entries: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%",
            help="What a layer keeps at most, with --by, e.g. --max-entries 50% --by gain.",
        ),
    ] = None,
    by: Annotated[
        flags.RankingName | None,
        typer.Option(
            help="Who goes first when a layer has more than --max-entries: the oldest, the least used, of least "
            "gain or strength, those that disagree most, those that others cover best, or chance, e.g. gain."
        ),
    ] = None,
    keep_at_least: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Entries that stay in each layer whatever the policies say, except --forget; 1 when not given, "
            "e.g. 1000.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of --by random and of the sample of lookups, e.g. 7.")
    ] = 0,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Only this layer; repeat it for more (--layer 14 --layer 15). All when not given.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would go; delete nothing, e.g. --dry-run."),
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; needed in scripts, e.g. --yes.")
    ] = False,
) -> None:
    """Delete the entries of a memory that any of the given policies drops. Asks first.

    The service answers meanwhile; entries that are written meanwhile stay. Ctrl-C ends it: what was deleted until
    then stays deleted. Disk space comes back with `optimize`.

    To shrink a memory take --max-entries with --by strength for logit deltas, with --by gain for assignments: they
    kept most of the gain (docs/experiments.md).

    Example:
      router-admin prune bible --near-duplicates 0.98 --dry-run
      router-admin prune bible --max-entries 50% --by strength --yes
      router-admin prune bible --older-than 90d --unused-below 1 --spare-newer-than 7d --yes
      router-admin prune bible --forget genesis.txt --keep-at-least 0 --yes

    """
    entries, share = flags.size(max_entries)
    plan = pb.PrunePlan(
        forget=flags.filters(forget),
        older_than_unix_ms=flags.moment("--older-than", older_than),
        unused_below=unused_below,
        spare_newer_than_unix_ms=flags.moment("--spare-newer-than", spare_newer_than),
        gain_below=gain_below,
        strength_below=strength_below,
        agreement_below=disagreeing_below,
        near_duplicate_similarity=near_duplicates,
        near_duplicate_agreement=value_agreement,
        max_entries=entries,
        max_share=share,
        by=by.wire_name if by is not None else None,
        keep_at_least=keep_at_least,
        seed=seed,
    )
    _check(plan)
    request = pb.PruneRequest(memory=name, layers=layer, plan=plan, dry_run=dry_run)
    session = session_of(context)
    if not dry_run and not yes:
        confirm("prune", lambda: _question(session, request))
    _emit(session, request, _run(session, request))


def _check(plan: pb.PrunePlan) -> None:
    """Refuses flags that mean nothing without others, by their own names. Raises BadInput."""
    sized = plan.WhichOneof("size") is not None
    if sized != bool(plan.by):
        raise BadInput("--max-entries and --by go together: how many may stay, and who goes first")
    if plan.HasField("near_duplicate_agreement") and not plan.HasField("near_duplicate_similarity"):
        raise BadInput("--value-agreement says more about --near-duplicates; give both")
    by_use = plan.HasField("unused_below") or plan.by == pb.PRUNE_RANKING_USE
    if plan.HasField("spare_newer_than_unix_ms") and not by_use:
        raise BadInput("--spare-newer-than goes with --unused-below, or with --by use")
    other = {"spare_newer_than_unix_ms", "near_duplicate_agreement", "keep_at_least", "seed", "by"}
    if not {field.name for field, _ in plan.ListFields()} - other:
        raise BadInput(_NOTHING)


def _run(session: Session, request: pb.PruneRequest) -> list[dict[str, Any]]:
    """What became of each layer."""
    replies = followed(session, session.client.retention.Prune, request)
    return [plain(reply.layer) for reply in replies if reply.HasField("layer")]


def _question(session: Session, request: pb.PruneRequest) -> str:
    """Asks the service what would go, and shows it."""
    dry = pb.PruneRequest()
    dry.CopyFrom(request)
    dry.dry_run = True
    layers = _run(session, dry)
    _render(Console(stderr=True, highlight=False), layers, dry_run=True)
    dropped, entries = _total(layers, "dropped"), _total(layers, "entries")
    return f"Delete these {dropped} of {entries} entries of {request.memory}?"


def _emit(session: Session, request: pb.PruneRequest, layers: list[dict[str, Any]]) -> None:
    names = ("entries", "dropped", "deleted", "spared", "bytes_estimate")
    document = {"memory": request.memory, "dry_run": request.dry_run}
    document |= {name: _total(layers, name) for name in names}
    session.output.emit(
        document | {"layers": layers},
        lambda console: _render(console, layers, dry_run=request.dry_run),
    )


def _total(layers: list[dict[str, Any]], name: str) -> int:
    return sum(layer[name] for layer in layers)


def _render(console: Console, layers: list[dict[str, Any]], *, dry_run: bool) -> None:
    gone = "dropped" if dry_run else "deleted"
    columns = ("layer", "entries", gone, "kept", "rescued", "spared", "MiB", "unseen", "reasons")
    rows = [
        [
            *(layer[name] for name in ("layer", "entries", gone, "kept", "rescued", "spared")),
            round(layer["bytes_estimate"] / 2**20, 3),
            layer["incomplete_searches"],
            ", ".join(f"{name} {count}" for name, count in layer["reasons"].items()),
        ]
        for layer in layers
    ]
    console.print("would be deleted; nothing was:" if dry_run else "deleted:")
    console.print(table(columns, rows))
    effects = [_effect(layer) for layer in layers if layer["expected_effect"]]
    if effects:
        console.print("expected effect on lookups, before -> after:")
        console.print(table(tuple(effects[0]), [list(effect.values()) for effect in effects]))


def _effect(layer: dict[str, Any]) -> dict[str, object]:
    """One row, in the words of the settings."""
    means = layer["expected_effect"]
    pairs = {
        name: f"{means[f'{name}_before']:.4g} -> {means[f'{name}_after']:.4g}"
        for name in ("lambda", "abstained", "agreement")
    }
    size = f"{means['contribution_before']:.4g}, changed by {means['contribution_change']:.4g}"
    return {
        "layer": layer["layer"], "lookups": int(means["queries"]), **pairs, "contribution": size
    }  # fmt: skip
