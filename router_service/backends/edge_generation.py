"""Makes the next generation of a collection's files beside the present one, which stays in use meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from router_service.backends.disk import FreeSpace, copy_tree, disk_bytes, remove_tree
from router_service.backends.edge_engine import EngineShard
from router_service.backends.edge_files import CollectionFiles, Pointer
from router_service.backends.optimize_job import OptimizeJob
from router_service.backends.value_table import ValueTable
from router_service.errors import StorageError


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What the collections of a backend share."""

    search_threads: int
    free_space: FreeSpace


def create_files(files: CollectionFiles, pointer: Pointer, settings: EdgeSettings) -> None:
    """The files of an empty collection; after a crash they are all there or count as leftovers."""
    settings.free_space.require()
    files.remove_leftovers(None)
    directory = files.shard(pointer.generation)
    shard = EngineShard.create(directory, pointer.spec, settings.search_threads)
    shard.flush()
    shard.close()
    files.write(pointer)


def build_generation(
    files: CollectionFiles,
    current: Pointer,
    target: Pointer,
    table: ValueTable,
    job: OptimizeJob,
    settings: EdgeSettings,
) -> EngineShard:
    """The open, optimized shard of `target`, which CURRENT now names; whatever fails leaves `current` in force.

    The present shard must be flushed, and nobody may write to it until this returns.
    """
    try:
        _copy(files, current, target, settings)
        job.run(files.shard(target.generation), target.spec, target.quantization)
        return _take_over(files, target, table, settings)
    except BaseException:
        if files.read() != current:
            files.write(current)
        remove_tree(files.generation(target.generation))
        raise


def _copy(
    files: CollectionFiles, current: Pointer, target: Pointer, settings: EdgeSettings
) -> None:
    source = files.shard(current.generation)
    settings.free_space.require(2 * disk_bytes(source))  # the copy, and its index
    remove_tree(files.generation(target.generation))
    copy_tree(source, files.shard(target.generation))


def _take_over(
    files: CollectionFiles, target: Pointer, table: ValueTable, settings: EdgeSettings
) -> EngineShard:
    directory = files.shard(target.generation)
    shard = EngineShard.load(directory, target.spec, target.quantization, settings.search_threads)
    try:
        if (entries := shard.count()) != len(table):
            raise StorageError(f"{directory} has {entries} entries, expected {len(table)}")
        table.save(files.values(target.generation))
        files.write(target)
    except BaseException:
        shard.close()
        raise
    return shard
