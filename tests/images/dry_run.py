"""Builds docker/sidecar.Dockerfile, and docker/runner.Dockerfile with --runner, and uses them: `make docker-check`.

The sidecar serves on a Unix socket from a read-only root as the image's user, is used by docker/exercise.sh, killed,
stopped and started again. With --runner, the runner builds a memory and generates with it, through the socket alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.images.container import Container
from tests.images.dockerfile import DOCKER
from tests.images.dry_build import DryBuildError, build

SOCKETS, MEMORIES, CACHE = "/run/knnmoe", "/var/lib/knnmoe", "/var/cache/knnmoe"
ENVIRONMENT = "/opt/knnmoe"
PACKAGES = f"{ENVIRONMENT}/lib/python3.11/site-packages"
TEXTS = [f"The tenant shall keep the premises in good repair for {n} years." for n in range(20)]
_INSIDE = "--in-namespace"


def main() -> None:
    """Exit code 1 when a step fails; its output says which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", action="store_true", help="the runner's image as well")
    parser.add_argument(
        "--torch-index", help="where torch comes from, e.g. https://pypi.org/simple"
    )
    parser.add_argument(_INSIDE, type=Path, metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_namespace is None:
        sys.exit(_in_namespace())
    try:
        index = {"TORCH_INDEX": arguments.torch_index} if arguments.torch_index else {}
        _check(arguments.in_namespace, arguments.runner, index)
    except DryBuildError as error:
        sys.exit(f"docker-check: {error}")


def _in_namespace() -> int:
    # The files are removed out here, where nothing is mounted on them.
    with tempfile.TemporaryDirectory(prefix="knnmoe-dry-") as scratch:
        again = [sys.executable, "-m", "tests.images.dry_run", *sys.argv[1:], _INSIDE, scratch]
        return subprocess.run(["unshare", "--mount", *again], check=False).returncode


def _check(scratch: Path, runner: bool, torch_index: dict[str, str]) -> None:
    volumes = {
        inside: scratch / f"volume{inside.replace('/', '-')}"
        for inside in (SOCKETS, MEMORIES, CACHE)
    }
    for directory in volumes.values():
        directory.mkdir()
    image = build(DOCKER / "sidecar.Dockerfile", {}, scratch)
    with Container(image, {SOCKETS: volumes[SOCKETS], MEMORIES: volumes[MEMORIES]}) as sidecar:
        _inspect(sidecar)
        sidecar.start()
        subprocess.run([DOCKER / "exercise.sh", *sidecar.prefix], check=True)
        _restart(sidecar)
        if runner:
            image = build(DOCKER / "runner.Dockerfile", torch_index, scratch)
            sockets = {SOCKETS: volumes[SOCKETS], CACHE: volumes[CACHE]}
            _run_model(Container(image, sockets, read_only=[SOCKETS]))
        _stop(sidecar)
    _say("docker-check: ok")


def _inspect(sidecar: Container) -> None:
    _say(f"version {sidecar.run(*sidecar.main('version')).strip()}")
    for module in ("torch", "transformers", "pip", "model_runner"):
        assert "ModuleNotFoundError" in sidecar.refuses("python", "-c", f"import {module}")
    for place in (f"{PACKAGES}/x", "/usr/x"):
        assert "Read-only file system" in sidecar.refuses("touch", place)
    _print_sizes(sidecar)


def _restart(sidecar: Container) -> None:
    before = sidecar.run("router-admin", "count", "exercise")
    sidecar.stop(signal.SIGKILL)
    sidecar.start()
    assert sidecar.run("router-admin", "count", "exercise") == before
    _stop(sidecar)
    sidecar.start()
    assert sidecar.run("router-admin", "count", "exercise") == before


def _stop(sidecar: Container) -> None:
    if code := sidecar.stop():
        raise DryBuildError(f"the sidecar ended with {code} on SIGTERM")


def _run_model(runner: Container) -> None:
    _print_sizes(runner)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    runner.run("sh", "-c", "cat > /tmp/law.jsonl", text=lines)
    runner.run(*runner.main("build", "--memory", "law", "--reference", "/tmp/law.jsonl"))
    generate = runner.main("generate", "--memory", "law", "--prompt", "The tenant shall")
    _say(f"generated: {runner.run(*generate, '--max-new-tokens', '12').strip()}")


def _print_sizes(container: Container) -> None:
    names = container.run("ls", PACKAGES).split()
    sizes = sorted(((container.kib(f"{PACKAGES}/{name}"), name) for name in names), reverse=True)
    _say(f"{ENVIRONMENT}: {container.kib(ENVIRONMENT) >> 10} MiB")
    for kib, name in sizes[:8]:
        _say(f"  {name}: {kib >> 10} MiB")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
