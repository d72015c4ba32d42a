"""The kit's own version and the versions of torch and transformers that it was run with."""

from __future__ import annotations

import functools
import os
from importlib import metadata

from fsdp_testkit.core.errors import EnvironmentLacksError

KIT_VERSION = "0.1.0"

#: Distribution name -> accepted ``(major, minor)`` pairs. Only what the kit's own matrix was run with.
SUPPORTED: dict[str, tuple[tuple[int, int], ...]] = {
    "torch": ((2, 13),),
    "transformers": ((5, 23),),
}


@functools.cache  # the ledger asks for each entry and row, and each answer is a search of the disk
def installed_version(distribution: str) -> str:
    """Return the version of ``distribution``, or ``""`` where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def check_supported() -> None:
    """Raise where torch or transformers is missing or lies outside the range that was run.

    Raises:
        EnvironmentLacksError: names the distribution, the version found and the versions accepted.
    """
    for name, accepted in SUPPORTED.items():
        found = installed_version(name)
        wanted = " or ".join(f"{major}.{minor}.x" for major, minor in accepted)
        if not found:
            raise EnvironmentLacksError(f"{name} is not installed; fsdp_testkit {KIT_VERSION} needs {wanted}")
        if os.environ.get("FSDP_TESTKIT_ANY_VERSION") == "1":
            continue
        if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) not in accepted:
            raise EnvironmentLacksError(
                f"{name} {found} is outside the versions that fsdp_testkit {KIT_VERSION} was run with: "
                f"{wanted}. Install one of them, or set FSDP_TESTKIT_ANY_VERSION=1 to go on at your own risk"
            )
