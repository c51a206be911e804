"""Aliases that change places: what collections are called when a memory takes the place of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router_service.backends.qdrant_server.wire import q

# What a name led to before has this alias beside that of the name, so that it is found after a crash.
_REPLACED = "~~replaced"


def replaced(alias: str) -> str:
    """The alias of the collection that an alias led to before it was moved."""
    return f"{alias}{_REPLACED}"


def moved(moves: Mapping[str, str], aliases: Mapping[str, str]) -> list[Any]:
    """Actions of one UpdateAliases: each alias leads to where another one leads, which goes.

    The last action makes an alias that was not there. `aliases`: all there are, with what they lead to. Nothing for a
    move whose other alias is not there.
    """
    actions = []
    for alias, other in moves.items():
        if other in aliases:
            actions += [delete(alias), delete(other), _create(alias, aliases[other])]
            if alias in aliases:
                actions.append(_create(replaced(alias), aliases[alias]))
    return actions


def delete(alias: str) -> Any:
    """The action that removes an alias, if it is there."""
    return q.AliasOperations(delete_alias=q.DeleteAlias(alias_name=alias))


def _create(alias: str, collection: str) -> Any:
    create = q.CreateAlias(collection_name=collection, alias_name=alias)
    return q.AliasOperations(create_alias=create)
