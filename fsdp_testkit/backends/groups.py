"""What torch remembers of process groups that are gone."""

from __future__ import annotations

from fsdp_testkit.reference.adapter import forget_meshes


def forget_groups() -> None:
    """Drop what torch has cached about meshes of an earlier process group; call it with the new group set up."""
    forget_meshes()
