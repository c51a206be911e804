"""docker/node_loss.sh, which docker/smoke.sh runs on a real cluster of containers, on a cluster of stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.congruence.fast_dir import fast_dir
from tests.images.dockerfile import DOCKER
from tests.qdrant_standin.process import ClusterProcess
from tests.sidecar import running_sidecar

__all__ = ["fast_dir"]

# The script gives up by itself; one that hangs is ended before the test is, so that it can be read where.
PATIENCE_S = 270


@pytest.fixture
def cluster(fast_dir: Path) -> Iterator[ClusterProcess]:
    with ClusterProcess(fast_dir / "qdrant") as running:
        yield running


def test_a_node_that_is_lost_while_entries_are_written(
    cluster: ClusterProcess, fast_dir: Path
) -> None:
    first, *_ = cluster.peers
    nodes = ",".join(cluster.urls)
    stop, start = (
        _on_request(fast_dir / name, call)
        for name, call in (("stop", first.kill), ("start", first.start))
    )
    flags = ["--qdrant-replication-factor", "2"]
    with running_sidecar(fast_dir / "data", backend=nodes, flags=flags) as sidecar:
        beside = ["env", f"ROUTER_ADMIN_TARGET={sidecar.target}", f"ROUTER_SERVICE_BACKEND={nodes}"]
        environment = {**os.environ, "STOP_NODE": stop, "START_NODE": start}
        said = fast_dir / "said"  # a file: what is left of a script that is ended may hold a pipe
        with said.open("w") as output:
            script = subprocess.Popen(
                [DOCKER / "node_loss.sh", *beside],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = script.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(script.pid, signal.SIGKILL)
                script.wait()
        assert code == 0, f"{said.read_text()}\n{sidecar.stderr}"
    assert "node_loss: ok: " in said.read_text()


def _on_request(place: Path, call: Callable[[], object]) -> str:
    """A shell command that has `call` run here, once, and ends when that is done."""
    asked, done = place.with_suffix(".asked"), place.with_suffix(".done")
    os.mkfifo(asked)
    os.mkfifo(done)

    def answer() -> None:
        asked.read_text()  # waits for the command
        call()
        done.write_text("done\n")

    threading.Thread(target=answer, daemon=True).start()
    return f"echo > {asked}; read -r < {done}"
