"""A slow link between two network namespaces: packets wait as long as a bandwidth and a latency say.

Each namespace gets a TUN device, and a thread here carries packets between the two: a packet leaves when the link is
free, occupies it for its bits, and arrives the latency later. tc's netem does the same where a kernel has it, which is
not everywhere. Packets are as large as a TUN device allows, so that the thread has little to do. Processes inside see
their own address under the machine's name, as gloo looks it up.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import pathlib
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from jaxlib_methods.parallel.pipelines.links import Link

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET = 65_000  # bytes, at most
ADDRESSES = ("10.77.0.1", "10.77.0.2")
# A window for the link's bandwidth times its latency, and no slow start after a pause.
SYSCTLS = (
    "net.ipv4.tcp_rmem=4096 16777216 33554432",
    "net.ipv4.tcp_wmem=4096 16777216 33554432",
    "net.ipv4.tcp_slow_start_after_idle=0",
)


def unavailable() -> str | None:
    """Why this machine has no slow links; None if it has."""
    if os.geteuid() != 0 or not pathlib.Path("/dev/net/tun").exists():
        return "network namespaces and TUN devices need Linux and root's rights"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add failed: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@contextlib.contextmanager
def slow_link(link: Link) -> Iterator[Callable[[int], list[str]]]:
    """Two hosts at the ends of a link: yields the prefix of a command that runs it on host 0 or 1.

    Their addresses are `ADDRESSES`.
    """
    names = [f"link{os.getpid()}-{i}" for i in range(2)]
    stop = threading.Event()
    with contextlib.ExitStack() as at_end:
        folder = pathlib.Path(at_end.enter_context(tempfile.TemporaryDirectory()))
        devices = []
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            at_end.callback(_ip, "netns", "del", name)
            devices.append(_tun(f"tun{os.getpid()}{i}"))
            at_end.callback(os.close, devices[i])
            tun = ("dev", f"tun{os.getpid()}{i}")
            _ip("link", "set", *tun, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", *tun)
            _ip("-n", name, "link", "set", *tun, "mtu", str(PACKET), "up")
            for setting in SYSCTLS:
                subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", setting], check=True)
            (folder / name).write_text(f"127.0.0.1 localhost\n{ADDRESSES[i]} {socket.gethostname()}\n")
        carrier = threading.Thread(target=_carry, args=(devices, link, stop), daemon=True)
        carrier.start()
        at_end.callback(carrier.join)
        at_end.callback(stop.set)
        enter = 'mount --bind "$0" /etc/hosts && exec "$@"'
        yield lambda i: [
            "nsenter", f"--net=/var/run/netns/{names[i]}", "unshare", "-m", "sh", "-c", enter, str(folder / names[i]),
        ]  # fmt: skip


def _carry(devices: list[int], link: Link, stop: threading.Event) -> None:
    free, under_way, order = [0.0, 0.0], [], itertools.count()
    while not stop.is_set():
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.2
        for device in select.select(devices, [], [], min(wait, 0.2))[0]:
            source = devices.index(device)
            packet = os.read(device, PACKET + 100)
            free[source] = max(time.monotonic(), free[source]) + link.seconds(len(packet))
            heapq.heappush(under_way, (free[source] + link.latency, next(order), devices[1 - source], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            os.write(target, packet)


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
