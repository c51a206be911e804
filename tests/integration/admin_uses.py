"""A use of every command of `router-admin`, for tests that let each of them meet the same faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer

from router_service.cli.admin import app
from router_service.cli.options import whole

FLAGS = (
    "--architecture tiny_moe --num-layers 3 --hidden-size 16 --num-experts 8 --top-k 2 --router-hash "
    + "5eed" * 16
)


@dataclass(frozen=True)
class Use:
    """Words after `router-admin`: {name} is a memory, {file} an exported one, {out} a file to make."""

    words: str
    # It reads or changes a memory that must be there.
    needs: bool = False
    # It makes a memory called {name}.
    makes: bool = False
    # It takes more than a few bytes of the service's disk.
    grows: bool = False
    # It writes nothing.
    reads: bool = False

    def arguments(self, **places: object) -> list[str]:
        """The words, one by one, with the places filled in; a name may hold anything."""
        return [word.format(**places) for word in self.words.split()]


# Two uses of one command are told apart by what follows the slash.
USES: dict[str, Use] = {
    "upsert": Use("upsert {name} {file}", needs=True, grows=True),
    "count": Use("count {name}", needs=True, reads=True),
    "export": Use("export {name} {out}", needs=True, reads=True),
    "merge": Use("merge other {name}", needs=True, grows=True),
    "merge/from": Use("merge {name} other", needs=True),
    "migrate": Use("migrate {name} --from embedded --to {out}", needs=True),
    "calibrate": Use("calibrate {name}", needs=True),
    "optimize": Use("optimize {name} --quantization int8", needs=True, grows=True),
    "quantize": Use("quantize {name} --method int8", needs=True, grows=True),
    "quantize/measure": Use("quantize {name} --measure --methods int8", needs=True, grows=True),
    "stats": Use("stats {name}", needs=True, reads=True),
    "health": Use("health"),
    "import": Use("import {file} --as {name}", makes=True, grows=True),
    "import/into": Use("import {file} --into {name}", needs=True, grows=True),
    "doctor": Use("doctor"),
    "memory list": Use("memory list"),
    "memory show": Use("memory show {name}", needs=True, reads=True),
    "memory create": Use("memory create {name} " + FLAGS, makes=True, grows=True),
    "memory set": Use("memory set {name} --neighbours 3", needs=True),
    "memory delete": Use("memory delete {name} --yes", needs=True),
    "memory replace": Use("memory replace {name} --by other --yes", needs=True),
    "memory replace/by": Use("memory replace other --by {name} --yes", needs=True),
    "sources": Use("sources {name}", needs=True, reads=True),
    "delete": Use("delete {name} --source text-0 --yes", needs=True),
    "prune": Use("prune {name} --max-entries 1 --by age --yes", needs=True),
    "snapshot create": Use("snapshot create {name}", needs=True, grows=True),
    "snapshot list": Use("snapshot list {name}"),
    "snapshot verify": Use("snapshot verify {name} monday", needs=True),
    "snapshot restore": Use("snapshot restore {name} monday --as new", needs=True, grows=True),
    "snapshot pack": Use("snapshot pack {name} monday {name}.tar", needs=True),
    "snapshot delete": Use("snapshot delete {name} monday --yes", needs=True),
    "operations list": Use("operations list"),
    "operations show": Use("operations show {name}", needs=True),
    "operations cancel": Use("operations cancel {name}", needs=True),
}


def command_names() -> set[str]:
    """Every command, as it is called: `memory list`."""
    return set(_names("", typer.main.get_command(app)))


def _names(prefix: str, command: Any) -> Iterator[str]:
    for name, each in command.commands.items():
        child = whole(each)
        if hasattr(child, "commands"):
            yield from _names(f"{prefix}{name} ", child)
        else:
            yield f"{prefix}{name}"
