"""Hosts as network namespaces on one switch, whose cable a test can pull: packets vanish, nobody is told.

Each host has a second line to the test alone, its console, which stays when the cable is pulled. To make them
takes the rights of root over the network.
"""

import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from rigs.stack import Host, wait_until

SWITCH_NET = "198.18"
"""With the console's: the block that is set aside for measurements between networks."""
CONSOLE_NET = "198.19"
CLOSED_PORT = 9
"""A host that is there refuses it."""


class NetworkError(Exception):
    """A network could not be made here, and why."""


@dataclass(frozen=True)
class Network:
    """Hosts by name, each with its address on the switch; the test stands on the switch too."""

    hosts: dict[str, Host]
    addresses: dict[str, str]

    def cut(self, name: str) -> None:
        """Pull a host's cable at the switch: both sides send into nothing."""
        _ip("link", "set", _port(name), "down")

    def mend(self, name: str) -> None:
        """Put it back, and wait until packets come through."""
        _ip("link", "set", _port(name), "up")
        wait_until(lambda: self.reaches(name), timeout_s=30, what=f"{name} is reached again")

    def reaches(self, name: str) -> bool:
        """Whether a host can be reached over the switch."""
        try:
            socket.create_connection((self.addresses[name], CLOSED_PORT), timeout=1.0).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True


@contextmanager
def network_of(names: Sequence[str]) -> Iterator[Network]:
    """A switch and its hosts. Raises: NetworkError where that is not permitted."""
    part = os.getpid() % 256
    switch = f"fp{os.getpid()}"
    network = Network({}, {})
    with ExitStack() as undo:
        _ip("link", "add", switch, "type", "bridge")
        undo.callback(_ip, "link", "del", switch)
        _ip("addr", "add", f"{SWITCH_NET}.{part}.1/24", "dev", switch)
        _ip("link", "set", switch, "up")
        for number, name in enumerate(names):
            netns, console = f"{switch}-{name}", f"{_port(name)}c"
            on_switch = f"{SWITCH_NET}.{part}.{number + 2}"
            ours, theirs = (f"{CONSOLE_NET}.{part}.{4 * number + end}" for end in (1, 2))
            _ip("netns", "add", netns)
            undo.callback(_ip, "netns", "del", netns)  # takes its ends of the lines along
            _ip("-n", netns, "link", "set", "lo", "up")
            _line(_port(name), netns, "eth0", f"{on_switch}/24")
            _ip("link", "set", _port(name), "master", switch)
            _line(console, netns, "eth1", f"{theirs}/30")
            _ip("addr", "add", f"{ours}/30", "dev", console)
            network.hosts[name] = Host(theirs, netns)
            network.addresses[name] = on_switch
        wait_until(lambda: all(map(network.reaches, names)), timeout_s=30, what="all hosts are reached")
        yield network


def _port(name: str) -> str:
    return f"fp{os.getpid()}{name}"


def _line(port: str, netns: str, inside: str, address: str) -> None:
    _ip("link", "add", port, "type", "veth", "peer", "name", inside, "netns", netns)
    _ip("link", "set", port, "up")
    _ip("-n", netns, "addr", "add", address, "dev", inside)
    _ip("-n", netns, "link", "set", inside, "up")


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NetworkError("there is no `ip` here") from error
    except subprocess.CalledProcessError as error:
        raise NetworkError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
