"""`router-admin sources`, `delete` and `prune`: where entries came from, and those that go, by name or by policy."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
import typer
from knnmoe import tensors
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import retention_pb2 as pb
from rich.console import Console

from router_service.arrays import MAX_ENTRY_ID
from router_service.cli.errors import AdminError, BadInput
from router_service.cli.operation_commands import followed
from router_service.cli.options import MemoryName, OnlyLayers, Yes
from router_service.cli.output import Bytes, Session, confirm, plain, session_of, table, utc

_NOTHING = (
    "say what goes: --forget, --older-than, --unused-below, --gain-below, --strength-below, --disagreeing-below, "
    "--near-duplicates, or --max-entries with --by"
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

# What the columns of `prune` say.
_WORDS = {
    "dropped": "entries that a policy lets go",
    "deleted": "entries that are gone",
    "kept": "entries that stay",
    "rescued": "entries that a policy lets go and --keep-at-least keeps",
    "spared": "entries that were written meanwhile, and so stay",
    "disk": "what the entries that go take; `optimize` gives it back",
    "unseen": "entries that were judged by a part of their neighbours, for they have too many",
    "reasons": "entries by policy; one with several reasons counts in each",
}
_EFFECT_WORDS = {
    "lookups": "entries of the layer that were looked up, each without its own example",
    "lambda": "how far lookups trust the memory, from 0 to 1: the mean",
    "abstained": "share of lookups that find nothing near and keep the model's own routing",
    "agreement": "how well what is found agrees with the entry's own value; 1: it is the same, 0: no relation",
    "contribution": "size of what the memory adds to the routing, and how much of it would be another",
}
# Sources that are named when another one is not there.
_NEAR = 3


def sources(context: typer.Context, name: MemoryName, layer: OnlyLayers = None) -> None:
    """List where a memory's entries came from: entries, examples, when they were written, and hits.

    An example of several layers counts once; hits are how often lookups found an entry near. The service reads every
    entry, and answers lookups meanwhile; Ctrl-C ends it. `delete --source` forgets one.

    Example:
      router-admin sources bible
      router-admin sources bible --layer 15

    """
    session = session_of(context)
    found, unlisted = _sources(session, name, layer)
    document = {
        "memory": name,
        "layers": sorted(set(layer or ())),
        "entries": sum(one.entries for one in found) + unlisted,
        "sources": [plain(one) for one in found],
        "unlisted_entries": unlisted,
    }
    columns = ("source", "entries", "examples", "first written", "last written", "hits")
    rows = [
        (
            one.source or "(no source)",
            one.entries,
            one.examples,
            utc(one.first_unix_ms, seconds=False),
            utc(one.last_unix_ms, seconds=False),
            one.hits,
        )
        for one in found
    ]
    title = f"{len(found)} source(s) of {name}, {document['entries']} entries"
    session.output.table(document, columns, rows, title)
    if unlisted:
        session.output.remark(
            f"only the first {len(found)} sources are listed; {unlisted} entries are of others"
        )


def _sources(
    session: Session, name: str, layers: Sequence[int] | None = None
) -> tuple[list[admin_pb.SourceDescription], int]:
    """In the order of their names, and how many entries are of sources that are not listed."""
    request = admin_pb.ListSourcesRequest(memory=name, layers=layers)
    found: list[admin_pb.SourceDescription] = []
    unlisted = 0
    for reply in followed(session, session.client.admin.ListSources, request, "page"):
        found += reply.page.sources
        unlisted += reply.page.unlisted_entries
    return found, unlisted


def delete(
    context: typer.Context,
    name: MemoryName,
    entry_id: Annotated[
        list[int] | None,
        typer.Option(
            "--id",
            min=0,
            max=MAX_ENTRY_ID,
            help="The entry of this id, in every layer; repeat it for more (--id 17 --id 18).",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="All entries of this source, e.g. genesis.txt.")
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            help="Of the source, only those of this example, e.g. --source kjv --example 3."
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Only in this layer, counted from 0, e.g. 15.")
    ] = None,
    fsync: Annotated[
        bool,
        typer.Option(
            "--fsync",
            help="Return when the deletion would survive loss of power, not only of the service, "
            "e.g. --fsync.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count; delete nothing, e.g. --dry-run.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete entries of a memory: some ids, or all of a source or of one of its examples. Asks first.

    `sources` lists what there is. The exit code is 1 when there was nothing to delete.

    Example:
      router-admin delete bible --source genesis.txt --dry-run
      router-admin delete bible --source genesis.txt --example 3 --yes
      router-admin delete bible --id 17 --id 18 --layer 15 --yes

    """
    request = _delete_request(entry_id, source, example)
    request.memory = name
    if layer is not None:
        request.layer = layer
    request.durability = admin_pb.DURABILITY_FSYNC if fsync else admin_pb.DURABILITY_PROCESS
    session = session_of(context)
    if not dry_run and not yes:
        counted = _delete(session, request, dry_run=True)
        if not counted.deleted:
            raise AdminError(f"nothing to delete: {_nothing(session, request)}")
        layers = sum(1 for one in counted.layers if one.deleted)
        question = f"Delete {counted.deleted} entries of {layers} layer(s) of {name}?"
        confirm(f"delete ({counted.deleted} entries)", lambda: question)
    reply = _delete(session, request, dry_run=dry_run)
    verb = "would delete" if dry_run else "deleted"
    rows = [[one.layer, one.deleted, one.entries - one.deleted] for one in reply.layers]

    def render(console: Console) -> None:
        console.print(f"{verb} {reply.deleted} entries of {name}")
        console.print(table(("layer", verb, "left"), rows))

    document = {"memory": name, "dry_run": dry_run, **plain(reply)}
    if reply.deleted or session.output.as_json:
        session.output.emit(document, render)
    if not reply.deleted:
        raise AdminError(f"nothing to delete: {_nothing(session, request)}")


def _nothing(session: Session, request: pb.DeleteRequest) -> str:
    """Why a deletion found no entry: which of the names is not there, and which are near it."""
    where = request.memory + (f", layer {request.layer}" if request.HasField("layer") else "")
    if request.WhichOneof("what") == "ids":
        return f"{where} has no entry of these ids"
    wanted = request.filter
    found = {one.source: one for one in _sources(session, request.memory)[0]}
    if wanted.source not in found:
        near = _near(wanted.source, list(found), request.memory)
        return f"{request.memory} has no source {wanted.source!r}; {near}"
    there = found[wanted.source]
    example = f"example {wanted.example!r} of " if wanted.HasField("example") else ""
    return (
        f"{where} has no entry of {example}source {wanted.source!r} "
        f"({there.entries} entries of {there.examples} examples in all layers)"
    )


def _near(wanted: str, names: Sequence[str], memory: str) -> str:
    """What may have been meant, and where the rest is to be found."""
    near = [name for name in names if wanted.lower() in name.lower()]
    near = near or difflib.get_close_matches(wanted, names, _NEAR)
    shown = ", ".join(repr(name) for name in near[:_NEAR])
    return (
        f"near it: {shown}; " if near else ""
    ) + f"`router-admin sources {memory}` lists all {len(names)}"


def _delete_request(
    ids: list[int] | None, source: str | None, example: str | None
) -> pb.DeleteRequest:
    if bool(ids) == (source is not None):
        raise BadInput("say what to delete: either --id (repeated for more) or --source")
    if ids and example is not None:
        raise BadInput("--example names an example of a --source; it does not go with --id")
    if ids:
        unique = np.unique(np.array(ids, np.uint64))
        return pb.DeleteRequest(ids=tensors.to_tensor(unique))
    return pb.DeleteRequest(filter=pb.EntryFilter(source=source, example=example))


def _delete(session: Session, request: pb.DeleteRequest, *, dry_run: bool) -> Any:
    request.dry_run = dry_run
    return session.client.unary(session.client.retention.Delete, request, long=True, repeat=True)


class RankingName(StrEnum):
    """PruneRanking, as a flag."""

    AGE = "age"
    USE = "use"
    GAIN = "gain"
    STRENGTH = "strength"
    DISAGREEMENT = "disagreement"
    COVERAGE = "coverage"
    RANDOM = "random"

    @property
    def wire_name(self) -> str:
        """Of the enum on the wire."""
        return f"PRUNE_RANKING_{self.value.upper()}"


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
            help="Entries that hardly move routing: norm of the logit deltas, distance of the logits to equal ones, "
            "or half the L1 distance of the assignment to the uniform one, e.g. 0.05."
        ),
    ] = None,
    disagreeing_below: Annotated[
        float | None,
        typer.Option(
            help="Entries that contradict their neighbours from other examples: cosine of the deltas or logits, "
            "or overlap of the assignments, below this, e.g. 0."
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
        RankingName | None,
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
    layer: OnlyLayers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go; delete nothing, e.g. --dry-run.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete the entries of a memory that any of the given policies drops. Asks first.

    The service answers meanwhile; entries that are written meanwhile stay. Ctrl-C ends it: what was deleted until
    then stays deleted. Disk space comes back with `optimize`. Where --forget names what is not there, nothing goes,
    and the exit code is 1.

    To shrink a memory take --max-entries with --by strength for logit deltas, with --by gain for assignments and
    logits: they kept most of the gain (docs/experiments.md). Entries of general text (sources general:FILE) change
    nothing, so that strength, gain and disagreement drop them first: `model-runner build` puts them back.

    Example:
      router-admin prune bible --near-duplicates 0.98 --dry-run
      router-admin prune bible --max-entries 50% --by strength --yes
      router-admin prune bible --older-than 90d --unused-below 1 --spare-newer-than 7d --yes
      router-admin prune bible --forget genesis.txt --keep-at-least 0 --yes

    """
    entries, share = size(max_entries)
    plan = pb.PrunePlan(
        forget=filters(forget),
        older_than_unix_ms=moment("--older-than", older_than),
        unused_below=unused_below,
        spare_newer_than_unix_ms=moment("--spare-newer-than", spare_newer_than),
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
    _require_there(session, request)
    if not dry_run and not yes:
        confirm("prune", lambda: _prune_question(session, request))
    layers = _run(session, request)
    names = ("entries", "dropped", "deleted", "spared", "bytes_estimate")
    totals = {total: _total(layers, total) for total in names}
    session.output.emit(
        {"memory": name, "dry_run": dry_run, **totals, "layers": layers},
        lambda console: _render(console, layers, dry_run=dry_run),
    )


def filters(texts: Sequence[str] | None) -> list[pb.EntryFilter]:
    """SOURCE or SOURCE/EXAMPLE; the first slash divides. Raises BadInput."""
    found = []
    for text in texts or ():
        source, slash, example = text.partition("/")
        if not source or (slash and not example):
            raise BadInput(f"--forget: got {text!r}, expected SOURCE or SOURCE/EXAMPLE")
        found.append(pb.EntryFilter(source=source, example=example if slash else None))
    return found


def moment(flag: str, text: str | None) -> int | None:
    """Milliseconds since the epoch of a time, or of an age before now. Raises BadInput."""
    if text is None:
        return None
    age = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", text)
    try:
        if age is not None:
            unix_s = time.time() - float(age[1]) * _SECONDS[age[2]]
        else:
            given = datetime.fromisoformat(text)
            unix_s = (given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as error:
        expected = "an age such as 30d, 12h or 90s, or a time such as 2026-01-31T12:00 (UTC)"
        raise BadInput(f"{flag}: got {text!r}, expected {expected}") from error
    if unix_s < 0:
        raise BadInput(f"{flag}: got {text!r}, expected a time after 1970")
    return int(unix_s * 1000)


def size(text: str | None) -> tuple[int | None, float | None]:
    """A number of entries, or a share of them, of `5000` or `50%`. Raises BadInput."""
    if text is None:
        return None, None
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text)
    if share is not None and 0 < float(share[1]) <= 100:
        return None, float(share[1]) / 100
    if re.fullmatch(r"\d{1,18}", text) and int(text) > 0:
        return int(text), None
    raise BadInput(f"--max-entries: got {text!r}, expected a number such as 5000, or 1% to 100%")


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


def _require_there(session: Session, request: pb.PruneRequest) -> None:
    """Refuses a plan that forgets what is not there, before anything goes. Raises AdminError."""
    for wanted in request.plan.forget:
        asked = pb.DeleteRequest(memory=request.memory, filter=wanted)
        if not _delete(session, asked, dry_run=True).deleted:
            raise AdminError(f"nothing to forget: {_nothing(session, asked)}")


def _run(session: Session, request: pb.PruneRequest) -> list[dict[str, Any]]:
    """What became of each layer."""
    replies = followed(session, session.client.retention.Prune, request, "layer")
    return [plain(reply.layer) for reply in replies]


def _prune_question(session: Session, request: pb.PruneRequest) -> str:
    """Asks the service what would go, and shows it."""
    dry = pb.PruneRequest()
    dry.CopyFrom(request)
    dry.dry_run = True
    layers = _run(session, dry)
    _render(Console(stderr=True, highlight=False), layers, dry_run=True)
    dropped, entries = _total(layers, "dropped"), _total(layers, "entries")
    return f"Delete these {dropped} of {entries} entries of {request.memory}?"


def _total(layers: list[dict[str, Any]], name: str) -> int:
    return sum(layer[name] for layer in layers)


def _render(console: Console, layers: list[dict[str, Any]], *, dry_run: bool) -> None:
    gone = "dropped" if dry_run else "deleted"
    columns = ("layer", "entries", gone, "kept", "rescued", "spared", "disk", "unseen", "reasons")
    rows = [
        [
            *(layer[name] for name in ("layer", "entries", gone, "kept", "rescued", "spared")),
            Bytes(layer["bytes_estimate"]),
            layer["incomplete_searches"],
            ", ".join(f"{name} {count}" for name, count in layer["reasons"].items()),
        ]
        for layer in layers
    ]
    console.print("would be deleted; nothing was:" if dry_run else "deleted:")
    console.print(table(columns, rows))
    words = [(word, meaning) for word, meaning in _WORDS.items() if word in columns]
    effects = [_effect(layer) for layer in layers if layer["expected_effect"]]
    if effects:
        console.print("expected effect on lookups, before -> after:")
        console.print(table(tuple(effects[0]), effects))
        words += [(word, _EFFECT_WORDS[word]) for word in effects[0] if word in _EFFECT_WORDS]
    console.print(table(("word", "what it says"), words))


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
