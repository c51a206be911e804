#!/usr/bin/env bash
# Makes, fills, copies, restores and counts memories of a running sidecar, and leaves behind the memory `exercise` of 4
# entries and the archive exercise.tar of its snapshot.
#   docker/exercise.sh COMMAND...    where COMMAND runs what follows it beside the sidecar: docker compose exec -T sidecar
set -euo pipefail
beside=("$@")
admin() { "${beside[@]}" router-admin "$@" </dev/null; }

entries() {
    for number in 1 2 3 4; do
        printf '{"layer": 0, "id": %d, "key": [%d, 1, 0, 0], "value": [0, 1, 0, %d]}\n' "$number" "$number" "$number"
    done
}

count() {
    found=$(admin --json count "$1")
    [[ $(tr -d ' \n' <<<"$found") == *'"entries":4'* ]] || { echo "memory $1: $found, expected 4 entries" >&2; exit 1; }
}

admin health
admin memory create exercise --architecture tiny --num-layers 2 --hidden-size 4 --num-experts 4 --top-k 2 \
    --router-hash "$(printf '5eed%.0s' {1..16})"
admin memory list
entries | "${beside[@]}" sh -c 'cat > /tmp/exercise.jsonl'
admin upsert exercise /tmp/exercise.jsonl
count exercise
admin export exercise /tmp/exercise.parquet --force
admin import /tmp/exercise.parquet --as exercise-copy
count exercise-copy
admin memory delete exercise-copy --yes
admin snapshot create exercise --as exercised
admin snapshot verify exercise exercised
admin snapshot pack exercise exercised exercise.tar
admin snapshot restore exercise exercised --as exercise-restored
count exercise-restored
admin memory delete exercise-restored --yes
admin snapshot delete exercise exercised --yes
admin stats
