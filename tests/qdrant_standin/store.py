"""All collections and aliases of a server, and the thread that optimizes them."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from pathlib import Path
from typing import Any

from router_service.backends.qdrant_server.wire import q as pb
from tests.qdrant_standin.collection import Collection, save_json
from tests.qdrant_standin.configs import changed
from tests.qdrant_standin.errors import (
    bad_input,
    collection_exists,
    no_collection,
    not_found,
)


class Optimizers:
    """One thread that indexes collections in the background, as the real server does."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Collection, bool] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._running = threading.Event()
        self._running.set()
        self._thread = threading.Thread(target=self._run, name="optimizers", daemon=True)
        self._thread.start()

    def request(self, collection: Collection, *, pending: bool) -> None:
        """Returns at once; a collection with pending work is yellow until it is done."""
        with self._lock:
            collection.requests += pending
        self._queue.put((collection, pending))

    def pause(self) -> None:
        """Collections stay yellow until resume()."""
        self._running.clear()

    def resume(self) -> None:
        """Goes on with what was requested meanwhile."""
        self._running.set()

    def close(self) -> None:
        """Leaves what is not begun to the next start, where it stays until somebody asks for it again."""
        self._closed = True
        self._running.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while work := self._queue.get():
            self._running.wait()
            if self._closed:
                return
            collection, pending = work
            collection.optimize()
            with self._lock:
                collection.requests -= pending


class Store:
    """What a directory holds. Names of collections in calls may be aliases, except where the server wants none."""

    peers = 1

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Each server has its own, also one that is not of a cluster.
        digest = hashlib.blake2b(str(directory).encode(), digest_size=8).digest()
        self.peer_id = int.from_bytes(digest, "big") >> 11
        self._root = directory / "collections"
        self._aliases_file = directory / "aliases.json"
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        found = (Collection.load(path) for path in sorted(self._root.iterdir()))
        self._collections = {each.name: each for each in found if each is not None}
        self._aliases: dict[str, str] = {}
        if self._aliases_file.exists():
            self._aliases = json.loads(self._aliases_file.read_text())
        self.optimizers = Optimizers()

    def close(self) -> None:
        """Releases the files."""
        self.optimizers.close()
        with self._lock:
            for collection in self._collections.values():
                collection.close()

    def names(self) -> list[str]:
        """Names of collections, sorted."""
        with self._lock:
            return sorted(self._collections)

    def get(self, name: str) -> Collection:
        """A collection by its name or an alias. Raises ApiError (NOT_FOUND)."""
        with self._lock:
            resolved = self._aliases.get(name, name)
            if resolved not in self._collections:
                raise no_collection(resolved)
            return self._collections[resolved]

    def create(
        self, name: str, config: pb.CollectionConfig, timeout_s: float | None = None
    ) -> None:
        """A new collection. Raises ApiError when the name is taken."""
        with self._lock:
            self._check_new(name)
            self._collections[name] = Collection.create(self._root, name, config)

    def _check_new(self, name: str) -> None:
        if name in self._collections:
            raise collection_exists(name)
        if name in self._aliases:
            raise bad_input(
                f"Can't create collection with name {name}. Alias with the same name already exists"
            )

    def update(self, request: pb.UpdateCollection) -> None:
        """Changes the configuration of a collection; indexing follows in the background."""
        with self._lock:
            collection = self.get(request.collection_name)
            collection.configure(changed(collection.config, request))
        self.optimizers.request(collection, pending=True)

    def change_fields(self, request: Any, operation: Any) -> None:
        """What all servers agree on before an index of a field is made or dropped: one has nobody to ask."""

    def written(self, collection: Collection) -> None:
        """Indexes what a write left without an index, in the background."""
        self.optimizers.request(collection, pending=collection.outgrown())

    def cluster_info(self, name: str) -> pb.CollectionClusterInfoResponse:
        """One node that has all shards; the first holds all points."""
        info = self.get(name).info()
        shards = info.config.params.shard_number
        return pb.CollectionClusterInfoResponse(
            peer_id=self.peer_id,
            shard_count=shards,
            local_shards=[
                pb.LocalShardInfo(
                    shard_id=shard, points_count=0 if shard else info.points_count, state=pb.Active
                )
                for shard in range(shards)
            ],
        )

    def cluster_status(self) -> dict[str, Any]:
        """What GET /cluster answers."""
        return {"status": "disabled"}

    def delete(self, name: str, timeout_s: float | None = None) -> bool:
        """Deletes a collection, by its own name only, and its aliases; False if there was none."""
        with self._lock:
            self._keep_aliases({a: c for a, c in self._aliases.items() if c != name})
            collection = self._collections.pop(name, None)
        if collection is not None:
            collection.delete()
        return collection is not None

    def aliases(self, collection: str | None = None) -> list[tuple[str, str]]:
        """Pairs of alias and collection, of one collection if it is given."""
        with self._lock:
            pairs = sorted(self._aliases.items())
        return [pair for pair in pairs if collection in (None, pair[1])]

    def change_aliases(
        self, actions: list[pb.AliasOperations], timeout_s: float | None = None
    ) -> None:
        """Applies actions in their order; no other call sees some of them only.

        As on the real server an action that fails leaves those before it applied.
        """
        with self._lock:
            for action in actions:
                self._change_alias(action)

    def _change_alias(self, action: pb.AliasOperations) -> None:
        aliases = dict(self._aliases)
        match action.WhichOneof("action"):
            case "create_alias":
                self._check_alias(action.create_alias)
                aliases[action.create_alias.alias_name] = action.create_alias.collection_name
            case "delete_alias":
                aliases.pop(action.delete_alias.alias_name, None)
            case "rename_alias":
                old = action.rename_alias.old_alias_name
                if old not in aliases:
                    raise not_found(f"Alias {old} does not exists!")
                aliases[action.rename_alias.new_alias_name] = aliases.pop(old)
        self._keep_aliases(aliases)

    def _check_alias(self, wanted: pb.CreateAlias) -> None:
        if wanted.collection_name not in self._collections:
            raise no_collection(wanted.collection_name)
        if wanted.alias_name in self._collections:
            raise collection_exists(wanted.alias_name)

    def _keep_aliases(self, aliases: dict[str, str]) -> None:
        if aliases != self._aliases:
            save_json(self._aliases_file, aliases)
            self._aliases = aliases
