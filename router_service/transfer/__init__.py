"""One way to copy entries: what `import`, `export`, `upsert`, `merge` and `migrate` do.

Entries go from a Source to a Sink (endpoints.py). An endpoint is one of three:
  file.py               a JSONL, Parquet or safetensors file (the formats' modules, and entry_fields.py for all)
  store.py              memories that this process opens itself: of a data directory, or a Qdrant server
  service               the memories of a running service, over its RPCs
Copy (copying.py) takes batches of a few MiB from one to the other. With a policy for conflicts both are walked
together in the order of ids, and only what the sink lacks or loses is written; with `verify` it goes on, pass after
pass, until nothing differs and both sum up to the same. A copy that was cut short is finished by the same copy again.
Migration (migration.py) is a verified copy of a memory with its settings and its indexes.
"""
