"""Where the agents of a session are, and how they are met."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError
from fsdp_testkit.ranks.agent import DEFAULT_PORT, versions
from fsdp_testkit.ranks.wire import Wire, WireError, ask, reason

#: Seconds that agents are waited for at first, since all are started at the same time; and once they were there.
FIRST_PATIENCE = 60.0
PATIENCE = 2.0
#: Seconds for one attempt to connect.
CONNECT_LIMIT = 3.0


@dataclass(slots=True)
class Hosts:
    """The agents that start the ranks of this session; shared by its harnesses.

    Args:
        addresses: ``host`` or ``host:port`` of the first agent of each host, in the order of ranks.
        secret: see `wire.read_secret`.
        exact: the addresses are those of all agents; no others are asked for.

    Raises:
        UsageError: an address of another form, or the same one twice.
    """

    addresses: Sequence[str]
    secret: bytes = field(repr=False)
    exact: bool = False
    #: What is changed from here on, such as by a fixture, reaches the ranks; the rest is each host's own.
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    #: Found by `find`: address, host's name and number of ranks of each agent.
    agents: list[tuple[tuple[str, int], str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        parsed = [parse_address(text) for text in self.addresses]
        if not parsed or len(set(parsed)) != len(parsed):
            raise UsageError(f"hosts={','.join(self.addresses)!r} must name one host or more, each of them once")

    def find(self) -> list[tuple[tuple[str, int], str, int]]:
        """Return all agents; the first call waits for them and asks each of them who it is.

        Raises:
            EnvironmentLacksError: one cannot be reached, or has other versions.
            UsageError: one refuses this pytest, or is named by an address that the others cannot use.
        """
        if self.agents:
            return self.agents
        end = time.monotonic() + FIRST_PATIENCE
        found: list[tuple[tuple[str, int], str, int]] = []
        for text in self.addresses:
            waiting = [parse_address(text)]
            while waiting:
                address = waiting.pop(0)
                wire, hello = greet(address, self.secret, end)
                wire.close()
                found.append((address, str(hello["name"]), int(hello["ranks"])))
                if not self.exact:
                    waiting.extend((address[0], port) for port in hello["siblings"])
        self.agents = found
        return found

    def hold(self) -> Callable[[], None]:
        """Keep all agents for this session: they end once the function that comes back is called, or this process ends.

        Raises:
            EnvironmentLacksError, UsageError: see `find`.
        """
        end = time.monotonic() + FIRST_PATIENCE
        wires = [greet(address, self.secret, end)[0] for address, _, _ in self.find()]
        for wire in wires:
            wire.send({"hold": True})

        def release() -> None:
            for wire in wires:
                wire.close()

        return release

    def room(self) -> list[tuple[str, int]]:
        """Return host's name and number of ranks of each agent; see `find`."""
        return [(name, ranks) for _, name, ranks in self.find()]


def parse_address(text: str, *, least: int = 1) -> tuple[str, int]:
    """Return host and port of ``host`` or ``host:port``; ``least`` is the lowest port.

    Raises:
        UsageError: it has another form.
    """
    host, colon, port = text.strip().partition(":")
    if not host or (colon and not (port.isascii() and port.isdigit() and least <= int(port) < 65536)):
        raise UsageError(f"host={text!r} must look like name, name:port or 10.0.0.1:{DEFAULT_PORT}")
    return host, int(port) if colon else DEFAULT_PORT


def greet(address: tuple[str, int], secret: bytes, end: float, name: str = "") -> tuple[Wire, dict[str, Any]]:
    """Connect to an agent, until ``end`` on the clock of ``time.monotonic``; return the connection and who it is.

    ``name`` is its host's, where that is known.

    Raises:
        EnvironmentLacksError: it cannot be reached, or has other versions.
        UsageError: it refuses this pytest.
    """
    shown = f"host {name} ({address[0]}:{address[1]})" if name else f"the agent at {address[0]}:{address[1]}"
    while True:
        try:
            link = socket.create_connection(address, timeout=max(0.5, min(CONNECT_LIMIT, end - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() + 0.2 >= end:
                raise EnvironmentLacksError(f"{shown} cannot be reached: {reason(error)}") from None
            time.sleep(0.2)
    wire = Wire(link)
    try:
        ask(wire, secret, shown)
        hello = wire.receive()[0]["hello"]
        theirs, ours = hello["versions"], versions()
        if theirs != ours:
            different = ", ".join(
                f"{name} {theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
                for name in sorted({*theirs, *ours})
                if theirs.get(name) != ours.get(name)
            )
            raise EnvironmentLacksError(f"{shown} has other versions: {different}")
    except WireError as error:
        wire.close()
        raise EnvironmentLacksError(f"{shown} cannot be used: {error}") from None
    except BaseException:
        wire.close()
        raise
    return wire, hello
