"""``python -m fsdp_testkit``."""

from __future__ import annotations

import sys

from fsdp_testkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
