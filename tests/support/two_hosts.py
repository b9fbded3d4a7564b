"""Two machines for a test, made of network namespaces that a cable connects, each with a name that resolves to its own address.

Needs root and the commands `ip` and `unshare`; `why_not` says what is missing. Nothing of it outlives `two_hosts`.
"""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_CLONE_NEWNET = 0x40000000  # linux/sched.h

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One of them."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The same command, run on this host. What a CPU's collectives connect to is the address of the host's own name."""
        script = f'hostname {self.address} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", script, "sh", *command]

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns where its sockets are this host's."""
        results: list[T] = []

        def call() -> None:
            with open(f"/var/run/netns/{self.namespace}", "rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(function())

        thread = threading.Thread(target=call)  # the namespace is the thread's
        thread.start()
        thread.join()
        return results[0]

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Without its cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", "cable", "down")
        try:
            yield
        finally:
            _ip("-n", self.namespace, "link", "set", "cable", "up")


def why_not() -> str:
    """Why there cannot be two hosts here; empty where there can."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need root and the commands ip and unshare"
    name = f"grok-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not permitted here"
    _ip("netns", "delete", name)
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both reach each other and themselves, and nothing else."""
    hosts = tuple(Host(namespace=f"grok-{os.getpid()}-{index}", address=f"10.77.0.{index + 1}") for index in range(2))
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        one, other = hosts
        _ip("-n", one.namespace, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.namespace, "link", "set", "cable", "up")
        yield one, other
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
