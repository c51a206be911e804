"""The network between namespaces: a program that passes packets on, late, not at all, or as they come.

    python -m tests.faults.wire --seed 0 NAMESPACE=10.77.0.1 NAMESPACE=10.77.0.2 ...

Each namespace gets a device whose packets come here (Linux, root; TUN): netem, which would do the same, is not in every
kernel. Lines on stdin are JSON, each answered by one on stdout: {"link": [A, B], "delay_s": 0.05, "jitter_s": 0.02,
"loss": 0.1} sets both directions of a link, and `null` ends all faults; answers are the packets so far.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.faults.namespaces import inside

DEVICE, _NETWORK_BITS = "wire0", 24
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 1 << 16
_IPV4, _ADDRESSES = 4, struct.Struct("!4s4s")


@dataclass(frozen=True, slots=True)
class Link:
    """How packets between two addresses go, either way; loss: the share that does not arrive."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0


class Wire:
    """All links. Packets of one direction keep their order."""

    def __init__(self, devices: dict[str, int], seed: int) -> None:
        """`devices`: descriptors by address."""
        self._devices = devices
        self._random = random.Random(seed)
        self._links: dict[frozenset[str], Link] = {}
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._last: dict[tuple[str, str], float] = {}
        self._numbers = itertools.count()
        self.passed = self.dropped = self.delayed = 0

    def run(self) -> None:
        """Until stdin ends."""
        events = select.poll()
        orders = sys.stdin.fileno()
        for descriptor in (*self._devices.values(), orders):
            events.register(descriptor, select.POLLIN)
        while True:
            wait_s = max(0.0, self._under_way[0][0] - time.monotonic()) if self._under_way else None
            for descriptor, _ in events.poll(None if wait_s is None else 1000 * wait_s):
                if descriptor != orders:
                    self._take(os.read(descriptor, _PACKET_BYTES))
                elif not self._obey(sys.stdin.readline()):
                    return
            self._deliver()

    def _obey(self, line: str) -> bool:
        if not line:
            return False
        order = json.loads(line)
        if order is None:
            self._links.clear()
        else:
            ends = frozenset(order.pop("link"))
            self._links[ends] = Link(**order)
        counts = {"passed": self.passed, "delayed": self.delayed, "dropped": self.dropped}
        sys.stdout.write(json.dumps(counts) + "\n")
        sys.stdout.flush()
        return True

    def _take(self, packet: bytes) -> None:
        if packet[0] >> 4 != _IPV4:
            return
        source, target = (".".join(map(str, each)) for each in _ADDRESSES.unpack_from(packet, 12))
        link = self._links.get(frozenset((source, target)), Link())
        if target not in self._devices:
            return
        if self._random.random() < link.loss:
            self.dropped += 1
            return
        late_s = link.delay_s + self._random.uniform(-1, 1) * link.jitter_s
        self.delayed += late_s > 0
        due = max(time.monotonic() + late_s, self._last.get((source, target), 0.0))
        self._last[source, target] = due
        heapq.heappush(self._under_way, (due, next(self._numbers), self._devices[target], packet))

    def _deliver(self) -> None:
        while self._under_way and self._under_way[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(self._under_way)
            os.write(device, packet)
            self.passed += 1


def device(namespace: str, address: str) -> int:
    """The descriptor of a new device in a namespace, which has the address."""
    with inside(namespace):
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        how = struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI)
        fcntl.ioctl(descriptor, _TUNSETIFF, how)
        for command in (
            f"address add {address}/{_NETWORK_BITS} dev {DEVICE}",
            f"link set {DEVICE} up",
            "link set lo up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
    return descriptor


def main() -> None:
    """Passes packets on until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.wire")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("hosts", nargs="+", metavar="NAMESPACE=ADDRESS")
    options = parser.parse_args()
    hosts = dict(each.split("=") for each in options.hosts)
    wire = Wire({address: device(name, address) for name, address in hosts.items()}, options.seed)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    wire.run()


if __name__ == "__main__":
    main()
