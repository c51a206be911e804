#!/usr/bin/env bash
# Builds the images, brings a set-up up, uses it, restarts it, and removes it with its volumes. Of the cluster a node is
# stopped and comes back: node_loss.sh. Needs Docker Engine 20.10 and Compose 2.6, as a plugin or on its own.
#   docker/smoke.sh embedded|qdrant|cluster|runner    runner: embedded, used by the runner as well
set -euo pipefail
cd "$(dirname "$0")"
setup=${1:?embedded, qdrant, cluster or runner}
files=(--file compose.yaml)
[[ $setup == embedded || $setup == runner ]] || files+=(--file "compose.$setup.yaml")

# Exits with 2 when version $2 of $1 is older than $3.
require() {
    [[ $(printf '%s\n' "$2" "$3" | sort --version-sort | head --lines 1) == "$3" ]] && return
    echo "smoke.sh: $1 is version ${2:-unknown}, and these files need $3 or later: docker/README.md" >&2
    exit 2
}
compose=(docker compose)
"${compose[@]}" version >/dev/null 2>&1 || compose=(docker-compose)
require "the Docker engine" "$(docker version --format '{{.Server.Version}}' || true)" 20.10
version=$("${compose[@]}" version --short || true)
require "${compose[*]}" "${version#v}" 2.6
project=("${compose[@]}" --project-name "knnmoe-smoke-$setup" "${files[@]}")

scratch=$(mktemp -d)
export QDRANT_API_KEY_FILE=$scratch/qdrant-api-key
# The directory keeps others out; the containers' users must be able to read the file.
openssl rand -hex 32 >"$QDRANT_API_KEY_FILE"
chmod 644 "$QDRANT_API_KEY_FILE"

finish() {
    code=$?
    [[ $code == 0 ]] || "${project[@]}" logs --no-color --tail 100
    "${project[@]}" --profile runner down --volumes --timeout 30
    rm -rf "$scratch"
    exit "$code"
}
trap finish EXIT

# The memory that exercise.sh left, within a minute.
answers() {
    for _ in {1..20}; do
        found=$("${project[@]}" exec -T sidecar router-admin --json count exercise </dev/null) &&
            [[ $(tr -d ' \n' <<<"$found") == *'"entries":4'* ]] && return
        sleep 3
    done
    echo "memory exercise: ${found:-no answer}, expected 4 entries" >&2
    return 1
}

run_model() {
    "${project[@]}" --profile runner build runner
    for number in {1..20}; do
        echo "{\"text\": \"The tenant shall keep the premises in good repair for $number years.\"}"
    done >"$scratch/law.jsonl"
    run=("${project[@]}" run --rm -T --volume "$scratch/law.jsonl:/texts/law.jsonl:ro" runner)
    "${run[@]}" build --memory law --reference /texts/law.jsonl
    "${run[@]}" generate --memory law --prompt 'The tenant shall' --max-new-tokens 12
}

"${project[@]}" config --quiet
"${project[@]}" build sidecar
timeout 600 "${project[@]}" up --detach --wait
./exercise.sh "${project[@]}" exec -T sidecar
"${project[@]}" cp sidecar:/var/lib/knnmoe/packs/exercise.tar "$scratch/exercise.tar"
tar --list --file "$scratch/exercise.tar" >/dev/null
"${project[@]}" restart sidecar
answers
case $setup in
    cluster)
        command=$(printf '%q ' "${project[@]}")
        STOP_NODE="$command stop qdrant-1" START_NODE="$command start qdrant-1" \
            ./node_loss.sh "${project[@]}" exec -T sidecar
        answers
        ;;
    runner) run_model ;;
esac
echo "$setup: ok"
