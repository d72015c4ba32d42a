"""Agents for tests: each stands for a host."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECRET = "a secret that only tests know"


def secret_file(folder: Path) -> Path:
    """Return a file with the secret that only this user can read."""
    file = folder / "secret"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(SECRET)
    return file


class AgentProcess:
    """``python -m fsdp_testkit ranks``, from its first line on.

    Args:
        folder: for the secret and what the agent prints.
        name: of the host.
        listen: address and port.
        ranks: that it offers.
        within: a command that runs it, such as ``ip netns exec NAME``.
        program: what stands for ``fsdp_testkit``.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        listen: str,
        ranks: int = 2,
        *,
        within: Sequence[str] = (),
        program: Sequence[str] = ("-m", "fsdp_testkit"),
        env: dict[str, str],
    ) -> None:
        self.log = folder / f"{name}.log"
        command = [*within, sys.executable, *program, "ranks", "--listen", listen, "--name", name]
        command += ["--ranks", str(ranks), "--secret-file", str(secret_file(folder)), "--beyond-loopback"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, stdout=log, env=env)
        self.address = self._address()

    def _address(self) -> str:
        """Wait for the line that says where it listens."""
        for _ in range(600):
            if found := re.search(r" at (\S+:\d+)$", self.log.read_text(), re.MULTILINE):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise RuntimeError(f"no agent: {self.log.read_text()}")

    def stop(self) -> int:
        """End it as torchrun does; return its exit status."""
        self.process.terminate()
        return self.process.wait(20)
