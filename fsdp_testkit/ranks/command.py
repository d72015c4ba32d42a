"""``python -m fsdp_testkit ranks``: an agent on this machine, started by torchrun, srun or by hand."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.ranks.agent import DEFAULT_PORT, Agent, AgentOptions, address_towards
from fsdp_testkit.ranks.hosts import parse_address
from fsdp_testkit.ranks.meet import Torchrun, meet
from fsdp_testkit.ranks.wire import SECRET_FILE_VARIABLE, SECRET_VARIABLE, read_secret

#: Where launchers write the number of a process on its machine, and how many there are.
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")
_LOCAL_WORLD_SIZE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Each process that torchrun starts offers one rank. Ranks of jobs are forked from it, so it survives them."
    )
    parser.add_argument(
        "--listen",
        default=f"127.0.0.1:{DEFAULT_PORT}",
        metavar="ADDRESS[:PORT]",
        help=f"where pytest connects to (127.0.0.1:{DEFAULT_PORT}); the local rank is added to the port",
    )
    parser.add_argument(
        "--beyond-loopback", action="store_true", help="allow another address than loopback: read the security notes"
    )
    parser.add_argument(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help=f"holds the secret shared with pytest (else in {SECRET_FILE_VARIABLE} or {SECRET_VARIABLE})",
    )
    parser.add_argument("--ranks", default="1", metavar="N", help="ranks of a job that this process starts (1)")
    # for `torchrun -m pytest`: find each other, serve one session and end
    parser.add_argument("--join", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="", help="of this machine, in reports (its host name)")


def run_agent(arguments: argparse.Namespace) -> int:
    """Listen until SIGTERM, SIGINT or the end of the launcher.

    Raises:
        UsageError: an argument is impossible, or there is no secret.
        EnvironmentLacksError: the port is taken.
    """
    if not arguments.ranks.isascii() or not arguments.ranks.isdigit():
        raise UsageError(f"--ranks={arguments.ranks!r} must be an integer of at least 1")
    if arguments.join:
        return _join(arguments)
    address, port = parse_address(arguments.listen, least=0)  # 0: the system chooses
    options = AgentOptions(
        address=address,
        port=port,
        beyond_loopback=arguments.beyond_loopback,
        secret=read_secret(arguments.secret_file),
        ranks=int(arguments.ranks),
        name=arguments.name,
        local_rank=_number(_LOCAL_RANK, 0),
        local_world_size=_number(_LOCAL_WORLD_SIZE, 1),
    )
    agent = Agent(options)
    _serve(agent)
    return 0


def _join(arguments: argparse.Namespace) -> int:
    outer = Torchrun.read(os.environ)
    if outer is None:
        raise UsageError("--join is for processes that torchrun has started")
    # Nobody knows this secret: the right one may come with the answer of rank 0.
    options = AgentOptions(
        address="127.0.0.1" if outer.one_machine else address_towards(outer.address),
        port=0,
        beyond_loopback=not outer.one_machine,
        secret=secrets.token_bytes(32),
        name=arguments.name,
        until_released=True,
    )
    agent = Agent(options)
    file = meet("follow", f"{agent.address}:{agent.port}")
    agent.options = replace(agent.options, secret=_own_file(file) if file else read_secret(arguments.secret_file))
    _serve(agent)
    return 0


def _own_file(path: str) -> bytes:
    """Read a secret whose file was named by somebody else: it must be this user's."""
    if Path(path).stat().st_uid != os.getuid():
        raise UsageError(f"the secret file {path} belongs to another user")
    return read_secret(path)


def _serve(agent: Agent) -> None:
    own = agent.options
    print(  # noqa: T201
        f"fsdp_testkit: {own.ranks} rank{'s' if own.ranks > 1 else ''} of host {own.name} "
        f"at {agent.address}:{agent.port}",
        file=sys.stderr,
        flush=True,
    )
    launcher = os.getppid() if "LOCAL_RANK" in os.environ else 0
    agent.serve(ended=lambda: launcher not in (0, os.getppid()))


def _number(names: tuple[str, ...], default: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text.isascii() and text.isdigit():
            return int(text)
    return default
