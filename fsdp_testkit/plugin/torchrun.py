"""``torchrun -m pytest``: rank 0 runs the tests, and the processes that torchrun has started are their ranks.

All processes collect the same tests. Where none of them runs on ranks, nothing is changed: each process runs its tests,
as pytest under torchrun always did. Otherwise the process of rank 0 goes on, and the others become agents.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fsdp_testkit.core.errors import UsageError
from fsdp_testkit.plugin.options import RUN_OPTIONS, is_worker
from fsdp_testkit.ranks import Hosts
from fsdp_testkit.ranks.meet import Torchrun, meet
from fsdp_testkit.ranks.wire import read_secret


def serve_or_lead(config: pytest.Config, outer: Torchrun) -> Hosts:
    """Become an agent and never come back, or return the agents of all processes, where this one is rank 0.

    Raises:
        UsageError: workers of xdist, or several machines without their secret or without leave to listen.
        EnvironmentLacksError: the processes did not find each other.
    """
    if is_worker(config):
        raise UsageError("torchrun starts the ranks of one pytest: leave -n away")
    options = config.stash[RUN_OPTIONS]
    if not outer.one_machine:
        if not options.beyond_loopback:
            raise UsageError(
                "the processes of torchrun are on several machines: say --fsdp-beyond-loopback, so that they listen "
                "where whoever knows the secret can run code as this user"
            )
        read_secret(options.secret_file)  # a missing one is told by all processes, before any of them waits
    command = [sys.executable, "-m", "fsdp_testkit", "ranks", "--join"]
    if options.secret_file is not None:
        command += ["--secret-file", str(options.secret_file)]
    if outer.rank:
        _show_output(config)
        os.execv(sys.executable, command)
    return _lead(config, outer, command)


def _show_output(config: pytest.Config) -> None:
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    sys.stdout.flush()
    sys.stderr.flush()


def _lead(config: pytest.Config, outer: Torchrun, command: list[str]) -> Hosts:
    file, secret = "", b""
    if outer.one_machine:
        secret = secrets.token_hex(32).encode()
        handle, file = tempfile.mkstemp(prefix="fsdp_testkit-secret-")  # readable by this user alone
        with os.fdopen(handle, "wb") as opened:
            opened.write(secret)
        config.add_cleanup(lambda: Path(file).unlink(missing_ok=True))
    else:
        secret = read_secret(config.stash[RUN_OPTIONS].secret_file)
    own = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        hosts = Hosts(json.loads(meet("lead", file)), secret, exact=True)
        release = hosts.hold()
    except BaseException:
        own.terminate()
        own.wait(10)
        raise

    def end() -> None:
        release()
        own.wait(10)

    config.add_cleanup(end)
    return hosts
