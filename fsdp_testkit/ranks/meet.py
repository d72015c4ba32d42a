"""How the processes of one torchrun find each other: through torchrun's own store, as its users do.

Anybody who reaches that store can read it, so it holds addresses and the name of a file, never a secret. On one machine
the secret is in that file, which only this user can read; between machines it has to be there before.

Runs as a process of its own, so that neither pytest nor an agent has to import torch:
``python -m fsdp_testkit.ranks.meet lead|follow TEXT``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from fsdp_testkit.core.errors import EnvironmentLacksError, UsageError

#: Seconds until the last process has come.
LIMIT = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchrun:
    """What torchrun has told this process.

    Attributes:
        rank: global rank of this process.
        world_size: number of processes.
        local_world_size: number of processes on this machine.
        address: of the machine that torchrun's store is on.
    """

    rank: int
    world_size: int
    local_world_size: int
    address: str

    @property
    def one_machine(self) -> bool:
        """Whether all processes are on this machine."""
        return self.local_world_size == self.world_size

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Torchrun | None:
        """Return what the environment says; ``None`` where torchrun has not started this process.

        Raises:
            UsageError: it was started in a way that leaves no store to meet at.
        """
        if "TORCHELASTIC_RUN_ID" not in env or "RANK" not in env or "WORLD_SIZE" not in env:
            return None
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise UsageError("torchrun must hold a store of its own: leave TORCH_DISABLE_SHARE_RDZV_TCP_STORE unset")
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE"]),
            address=env["MASTER_ADDR"],
        )


def meet(role: str, text: str) -> str:
    """Take part in a process of its own.

    Args:
        role: ``lead`` gives the secret's file and gets all addresses, by rank, as JSON; ``follow`` gives this
            process's address and gets the secret's file.
        text: what is given.

    Raises:
        EnvironmentLacksError: the others did not come in time, or the store is gone.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fsdp_testkit.ranks.meet", role, text],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EnvironmentLacksError(f"the processes of torchrun did not meet within {LIMIT:g} s: {last[:300]}")
    return done.stdout.strip()


def main(role: str, text: str) -> None:
    """Exchange what `meet` says and print the answer."""
    import torch.distributed as dist

    env = os.environ
    store = dist.PrefixStore(
        f"fsdp_testkit/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        dist.TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=LIMIT),
        ),
    )
    if role == "lead":
        store.set("secret", text)
        print(json.dumps([store.get(f"address{rank}").decode() for rank in range(int(env["WORLD_SIZE"]))]))  # noqa: T201
    else:
        store.set(f"address{env['RANK']}", text)
        print(store.get("secret").decode())  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
