"""Runs a dry-built image as its container would run, without a Docker engine: its user without capabilities or new
privileges, a read-only root, volumes where the image has them, PID 1 of its own, and no network.

from tests.images.container import Container
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tests.images.dry_build import DryBuildError, Image

_STOP_TIMEOUT_S = 30
_START_TIMEOUT_S = 60


class Container:
    """A read-only root with volumes; start() and stop() run its ENTRYPOINT and CMD, as often as wanted."""

    def __init__(
        self, image: Image, volumes: Mapping[str, Path], read_only: Collection[str] = ()
    ) -> None:
        """`volumes`: directories by their place inside; an empty one takes the owner that the image gives the place."""
        self._image = image
        self._process: subprocess.Popen[bytes] | None = None
        for inside, directory in volumes.items():
            self._mount(inside, directory, "ro" if inside in read_only else "rw")
        _mount("-t", "tmpfs", "-o", "mode=1777,size=64m", "tmpfs", str(image.root / "tmp"))
        _mount("-o", "remount,ro", str(image.root))

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGKILL)

    @property
    def prefix(self) -> list[str]:
        """What runs a command inside, as `docker exec` does."""
        user, _, group = self._text("USER").partition(":")
        confined = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        variables = [f"{name}={value}" for name, value in self._image.environment.items()]
        return [
            *("unshare", "--net", "chroot", str(self._image.root)),
            *("setpriv", f"--reuid={user}", f"--regid={group}", *confined),
            *("env", "--ignore-environment", *variables),
        ]

    def run(self, *command: str, text: str = "") -> str:
        """Runs a command to its end, with `text` as its stdin, and returns its stdout. Raises DryBuildError."""
        done = subprocess.run(
            [*self.prefix, *command], input=text.encode(), stdout=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise DryBuildError(f"exit code {done.returncode}: {' '.join(command)}")
        return done.stdout.decode()

    def refuses(self, *command: str) -> str:
        """stderr of a command that must fail. Raises DryBuildError when it does not."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, check=False)
        if not done.returncode:
            raise DryBuildError(f"succeeded, and should not have: {' '.join(command)}")
        return done.stderr.decode()

    def main(self, *arguments: str) -> list[str]:
        """ENTRYPOINT with `arguments`, or with CMD."""
        return [*self._exec_form("ENTRYPOINT"), *(arguments or self._exec_form("CMD"))]

    def start(self) -> None:
        """Starts ENTRYPOINT and CMD as PID 1 and waits until HEALTHCHECK succeeds. Raises DryBuildError."""
        isolated = ["unshare", "--pid", "--ipc", "--fork", "--kill-child"]
        self._process = subprocess.Popen([*isolated, *self.prefix, *self.main()])
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self.is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DryBuildError("the service did not become healthy")
            time.sleep(0.5)

    def is_healthy(self) -> bool:
        """Whether HEALTHCHECK succeeds."""
        check = [*self.prefix, *self._exec_form("HEALTHCHECK")]
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends PID 1 a signal and returns its exit code."""
        assert self._process is not None
        [child] = (
            Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        )
        os.kill(int(child), number)
        return self._process.wait(_STOP_TIMEOUT_S)

    def kib(self, inside: str) -> int:
        """What a directory inside takes, in KiB."""
        done = subprocess.run(
            ["du", "-sk", str(self._image.path(inside))], capture_output=True, check=True
        )
        return int(done.stdout.split()[0])

    def _mount(self, inside: str, directory: Path, mode: str) -> None:
        place = self._image.path(inside)
        if not any(directory.iterdir()):
            owner = place.stat()
            os.chown(directory, owner.st_uid, owner.st_gid)
            directory.chmod(owner.st_mode & 0o7777)
        _mount("--bind", str(directory), str(place))
        _mount("-o", f"remount,bind,{mode}", str(place))

    def _text(self, name: str) -> str:
        instruction = self._image.stage.last(name)
        assert instruction is not None, f"no {name}"
        return instruction.text

    def _exec_form(self, name: str) -> Sequence[str]:
        instruction = self._image.stage.last(name)
        assert instruction is not None, f"no {name}"
        return instruction.command or []


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
