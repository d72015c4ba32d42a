"""Write `docs/diagnosis.md` below the current folder."""

from __future__ import annotations

from pathlib import Path

from fsdp_testkit.diagnosis.page import page

if __name__ == "__main__":
    Path("docs/diagnosis.md").write_text(page(), encoding="utf-8")
