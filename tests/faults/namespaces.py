"""Machines on a network of their own: network namespaces of this one, between which packets are late or lost.

with Network(["sidecar", "node"]) as network:
    with network.hosts[0].entered():
        ...  # what is started here is on the first machine
    network.between(0, 1, delay_s=0.05, loss=0.1)
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_EXIT_S = 30.0
_TUN, _NAMESPACES, _OWN = Path("/dev/net/tun"), Path("/run/netns"), Path("/proc/thread-self/ns/net")


def obstacle() -> str | None:
    """Why there can be no such network here; None: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "no ip (Debian's package iproute2)"
    if not _TUN.exists():
        return f"no {_TUN}"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False)
    return (
        None if made.returncode == 0 else f"no network namespaces: {made.stderr.decode().strip()}"
    )


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Within it, what this thread opens and starts is in the namespace; nothing else of the process is."""
    with (
        _OWN.open("rb") as own,
        (_NAMESPACES / namespace).open("rb") as other,
    ):
        _set_namespace(other.fileno())
        try:
            yield
        finally:
            _set_namespace(own.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine."""

    namespace: str
    address: str

    def listen(self, address: tuple[str, int]) -> socket.socket:
        """A socket there."""
        with inside(self.namespace):
            return socket.create_server(address)


class Network:
    """From __enter__ to __exit__. Faults are of both directions of a link, and stay until heal()."""

    def __init__(self, hosts: int, seed: int = 0) -> None:
        name = f"knnmoe-{os.getpid()}"
        self.hosts = [Host(f"{name}-{n}", f"10.77.0.{n + 1}") for n in range(hosts)]
        self._seed, self._running = seed, ExitStack()

    def __enter__(self) -> Network:
        with ExitStack() as stack:
            for host in self.hosts:
                subprocess.run(["ip", "netns", "add", host.namespace], check=True)
                remove = ["ip", "netns", "delete", host.namespace]
                stack.callback(subprocess.run, remove, check=True)
            self._start_wire(stack)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def between(
        self,
        one: int,
        other: int,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        """Packets between two hosts are so late, give or take the jitter; of `loss`, 0 to 1, none arrives."""
        link = [self.hosts[one].address, self.hosts[other].address]
        self._order({"link": link, "delay_s": delay_s, "jitter_s": jitter_s, "loss": loss})

    def heal(self) -> dict[str, int]:
        """Ends all faults; packets so far that were passed on, delayed, dropped."""
        return self._order(None)

    def _start_wire(self, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "tests.faults.wire", "--seed", str(self._seed)]
        command += [f"{host.namespace}={host.address}" for host in self.hosts]
        pipe = subprocess.PIPE
        self._wire = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        )
        stack.callback(self._wire.terminate)
        ready = self._read_line()
        assert ready == "ready", ready

    def _order(self, order: object) -> dict[str, int]:
        assert self._wire.stdin is not None
        self._wire.stdin.write(json.dumps(order) + "\n")
        self._wire.stdin.flush()
        return dict(json.loads(self._read_line()))

    def _read_line(self) -> str:
        assert self._wire.stdout is not None
        return self._wire.stdout.readline().strip()
