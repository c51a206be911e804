#!/usr/bin/env bash
# A sidecar before a Qdrant cluster, a node of which is stopped while it writes, and comes back: nothing is lost, all
# nodes count the same, and a snapshot gives the answers of before.
#   STOP_NODE=COMMAND START_NODE=COMMAND docker/node_loss.sh BESIDE...
# where BESIDE runs what follows it beside the sidecar, with its environment: docker compose exec -T sidecar
set -euo pipefail
beside=("$@")
: "${STOP_NODE:?a command that stops a node}" "${START_NODE:?a command that starts it again}"
patience_s=${PATIENCE_S:-120}
scratch=$(mktemp -d)
finish() {
    code=$?
    [[ -z ${writer:-} ]] || kill "$writer" 2>/dev/null || true
    wait
    rm -rf "$scratch"
    exit "$code"
}
trap finish EXIT

say() { echo "node_loss: $*" >&2; }
fail() { say "$*"; exit 1; }
admin() { "${beside[@]}" router-admin "$@" </dev/null; }
python() { "${beside[@]}" python - "$@"; }

# Runs a command until it succeeds. What it said meanwhile is kept; none of it may be INTERNAL.
within_patience() {
    local give_up=$((SECONDS + patience_s)) said=$scratch/said.$BASHPID
    until "$@" >"$said" 2>&1; do
        sed "s/^/  /" "$said" >&2
        ! grep --quiet INTERNAL "$said" || fail "$*: INTERNAL is nothing that a cluster does by design"
        ((SECONDS < give_up)) || fail "not within $patience_s s: $*"
        sleep 1
    done
}

create() {
    admin memory create "$1" --kind logit_delta --architecture tiny --num-layers 2 --hidden-size 4 --num-experts 4 \
        --top-k 2 --router-hash "$(printf '5eed%.0s' {1..16})" --gamma 0.01
}
made() { admin memory show "$1" || create "$1"; }

# Entries of both layers, with these ids.
upsert() {
    local memory=$1 id
    shift
    for id in "$@"; do
        for layer in 0 1; do
            printf '{"layer": %d, "id": %d, "key": [%d, 1, %d, 0], "value": [0, 1, %d, 0]}\n' \
                "$layer" "$id" "$((id % 17))" "$((id / 17))" "$id"
        done
    done | "${beside[@]}" sh -c 'cat > "$2" && router-admin upsert "$1" "$2"' sh "$memory" "/tmp/$memory.jsonl"
}

# Passes when memory $1 has $2 entries: both layers.
has() {
    local found
    found=$(admin --json count "$1" | tr -d ' \n') || return 1
    [[ $found == *"\"entries\":$2,"*"\"entries\":$2"[,}]* ]] || { echo "memory $1: $found, expected $2 a layer"; return 1; }
}

# One line for each token that is looked up: what the memory answers, to the bit.
answers() {
    python "$1" <<'PY'
import os, sys
import numpy as np
from knnmoe.client import AdminClient, RoutingClient

target, memory = os.environ["ROUTER_ADMIN_TARGET"], sys.argv[1]
admin = AdminClient(target)
model = admin.describe(memory).fingerprint
inputs = np.array([[n % 17, 1, n / 20, n / 30] for n in range(60)], np.float32)
client = RoutingClient(target, memory, model)
for layer in (0, 1):
    for row in inputs:
        reply = client.route(layer, row[None], np.zeros((1, 4), np.float32), timeout_s=30)
        print(layer, reply.router_logits.data.hex(), reply.lambdas.data.hex())
client.close()
admin.close()
PY
}

# Passes when every node says that every copy of every collection is active, and all count the same entries.
nodes_agree() {
    python <<'PY'
import os, sys
import grpc
from router_service.backends.qdrant_server.wire import q

path = os.environ.get("ROUTER_SERVICE_QDRANT_API_KEY_FILE")
key = open(path).read().strip() if path else os.environ.get("ROUTER_SERVICE_QDRANT_API_KEY", "")
metadata = [("api-key", key)] if key else []


def counted(url):
    """The exact count of each collection, as this node has it."""
    counts = {}
    with grpc.insecure_channel(url.removeprefix("http://"), [("grpc.enable_http_proxy", 0)]) as channel:
        collections, points = q.CollectionsStub(channel), q.PointsStub(channel)
        names = collections.List(q.ListCollectionsRequest(), metadata=metadata, timeout=10)
        for name in sorted(each.name for each in names.collections):
            request = q.CollectionClusterInfoRequest(collection_name=name)
            info = collections.CollectionClusterInfo(request, metadata=metadata, timeout=10)
            states = {shard.state for shard in [*info.local_shards, *info.remote_shards]}
            if states - {q.ReplicaState.Value("Active")} or info.shard_transfers:
                sys.exit(f"{url}: {name}: not every copy is active: {states}")
            count = q.CountPoints(collection_name=name, exact=True)
            counts[name] = points.Count(count, metadata=metadata, timeout=10).result.count
    return counts


seen = {}
for url in os.environ["ROUTER_SERVICE_BACKEND"].split(","):
    try:
        seen[url] = counted(url)
    except grpc.RpcError as error:
        sys.exit(f"{url}: {error.details()}")
first, *others = seen.values()
if not first or any(other != first for other in others):
    sys.exit(f"nodes differ: {seen}")
print(sum(first.values()), "entries in", len(first), "collections on each of", len(seen), "nodes")
PY
}

# Writes one entry after the other, each until it is acknowledged, and keeps their ids.
write_on() {
    local id=100
    while [[ -e $scratch/go-on ]]; do
        within_patience upsert nodes "$id"
        echo "$id" >>"$scratch/written"
        id=$((id + 1))
    done
}
written() { wc --lines <"$scratch/written"; }
wait_for_writes() {
    local until=$(($(written) + $1))
    while (($(written) < until)); do
        kill -0 "$writer" 2>/dev/null || fail "the writes ended"
        sleep 0.2
    done
}

say "a memory and its snapshot, while all nodes are up"
create nodes
upsert nodes {1..40}
admin snapshot create nodes --as before
admin snapshot verify nodes before
answers nodes >"$scratch/before"
(($(sort --unique "$scratch/before" | wc --lines) > 20)) || fail "the answers do not depend on what is asked"

say "a node is stopped while writes go on"
touch "$scratch/go-on" "$scratch/written"
write_on &
writer=$!
wait_for_writes 2
bash -c "$STOP_NODE"
wait_for_writes 3
say "without the node: a memory is made, filled and counted"
within_patience made meanwhile
within_patience upsert meanwhile {1..4}
within_patience has meanwhile 4
answers nodes >/dev/null

say "the node comes back, while writes go on"
bash -c "$START_NODE"
wait_for_writes 2
rm "$scratch/go-on"
wait "$writer"
writer=
within_patience nodes_agree
nodes_agree
has nodes $((40 + $(written)))
has meanwhile 4
admin stats

say "the snapshot is restored, as a copy and in place"
admin snapshot restore nodes before --as restored
has restored 40
answers restored | cmp - "$scratch/before" || fail "a restored copy answers otherwise"
admin snapshot restore nodes before --replace --yes
has nodes 40
answers nodes | cmp - "$scratch/before" || fail "a memory that was restored in place answers otherwise"
within_patience nodes_agree
for memory in nodes meanwhile restored; do admin memory delete "$memory" --yes; done
say "ok: $(written) writes while a node was lost and came back"
