"""What nodes of a local Slurm are to each other: loopback addresses, or namespaces of their own.

A network says how the nodes are called and reached, and starts what runs on them.
"""

import ctypes
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Protocol

CLONE_NEWNET = 0x40000000
# In namespaces that end with this command.
PROBE = "ip link add br0 type bridge && ip link add up0 type veth peer name eth0 && hostname probe"


class Network(Protocol):
    """Where the nodes of a local Slurm live.

    Attributes:
        nodes: their names.
        controller: host of slurmctld, with its address.
        lines: of slurm.conf about the nodes; ``{first}`` and ``{last}`` are ports.
        silence_s: seconds after which Slurm takes a silent node for lost.
    """

    nodes: list[str]
    controller: str
    lines: str
    silence_s: int

    def open(self, folder: Path) -> None:
        """Make it; files go into the folder."""

    def close(self) -> None:
        """Leave nothing of it, whatever part of it was made."""

    def inside(self, node: str | None) -> list[str]:
        """The beginning of a command that runs on a node, or beside slurmctld for None."""


class Loopback:
    """Nodes that share this machine's network; the loopback address of each is its name.

    Args:
        count: nodes.
    """

    silence_s = 6

    def __init__(self, count: int) -> None:
        host = socket.gethostname().split(".")[0]
        self.nodes = [f"127.0.0.{10 + number}" for number in range(1, count + 1)]
        self.controller = f"{host}(127.0.0.1)"
        names = f"127.0.0.[11-{10 + count}]"
        self.lines = (
            f"NodeName={names} NodeAddr={names} NodeHostname={host} Port=[{{first}}-{{last}}]"
        )

    def open(self, folder: Path) -> None:
        """Nothing is to be made."""

    def close(self) -> None:
        """Nothing was made."""

    def inside(self, node: str | None) -> list[str]:
        return []


class Namespaces:
    """Nodes with a network, a host name and an /etc/hosts of their own, joined by a bridge.

    The bridge is in a namespace too, that of slurmctld, which this thread enters: nothing is added
    to the machine's own network, and no packet leaves these namespaces. They have no names; each
    lives as long as a process in it, and the first of these ends with this one.

    Args:
        count: nodes.
    """

    # Time for the ranks, and for the doctor, to notice it first.
    silence_s = 30

    def __init__(self, count: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, count + 1)]
        self.controller = "head(10.77.0.1)"
        self.lines = f"NodeName=n[1-{count}] NodeAddr=10.77.0.[11-{10 + count}] Port={{first}}"
        self._address = {name: f"10.77.0.{11 + index}" for index, name in enumerate(self.nodes)}
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._network_before: int | None = None

    def open(self, folder: Path) -> None:
        known = {"localhost": "127.0.0.1", "head": "10.77.0.1", **self._address}
        hosts = "".join(f"{address} {name}\n" for name, address in known.items())
        (folder / "hosts").write_text(hosts)
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self._make("head", folder)
        self._in("head", "ip link add br0 type bridge")
        self._in("head", "ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up")
        for node, address in self._address.items():
            pid = self._make(node, folder)
            self._in("head", f"ip link add {node} type veth peer name eth0 netns {pid}")
            self._in("head", f"ip link set {node} master br0 up")
            self._in(node, f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        self._network_before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        namespace = os.open(f"/proc/{self._holders['head'].pid}/ns/net", os.O_RDONLY)
        _enter_network(namespace)

    def close(self) -> None:
        if self._network_before is not None:
            _enter_network(self._network_before)
        for holder in self._holders.values():
            holder.kill()
            holder.communicate()

    def inside(self, node: str | None) -> list[str]:
        pid = self._holders[node or "head"].pid
        return ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", "--"]

    def unplug(self, node: str) -> None:
        """Cut a node off: what it sends and what is sent to it is lost without a word."""
        self._in("head", f"ip link set {node} down")

    def plug_in(self, node: str) -> None:
        """Undo that."""
        self._in("head", f"ip link set {node} up")

    def _make(self, name: str, folder: Path) -> int:
        """A process in new namespaces, which live as long as it does, and it as long as this."""
        script = (
            f"hostname {name} && ip link set lo up"
            f" && mount --bind {folder}/hosts /etc/hosts"
            f" && mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf"
            " && echo made && exec cat"
        )
        holder = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        if holder.stdout.readline() != b"made\n":
            raise OSError(f"the namespaces of {name} could not be made")
        return holder.pid

    def _in(self, name: str, command: str) -> None:
        subprocess.run([*self.inside(name), "sh", "-c", command], check=True)


def why_no_namespaces() -> str | None:
    """Why nodes cannot have namespaces here."""
    if os.environ.get("CI") != "1":
        return "nodes in network namespaces are made where CI=1 only"
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    if shutil.which("ip") is None:
        return "ip is missing: apt-get install iproute2"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", PROBE], capture_output=True, text=True
    )
    said = " ".join(done.stderr.split()) or f"status {done.returncode}"
    return f"namespaces are refused here: {said}" if done.returncode != 0 else None


def _enter_network(namespace: int) -> None:
    """Put this thread, and what it starts, into the open network namespace, and close it."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.setns(namespace, CLONE_NEWNET) != 0
    os.close(namespace)
    if failed:
        raise OSError(ctypes.get_errno(), "setns failed")
