"""Memory over time of each way to load, one panel a case; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw the memory of all ranks together, in multiples of the model's bytes, over seconds; write ``path``.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 3 * len(results)), squeeze=False, layout="constrained")
    for (panel,), result in zip(axes, results, strict=True):
        for name, row in result["methods"].items():
            times, held = together(row["timelines"])
            panel.step(times, [value / row["model_bytes"] for value in held], where="post", label=name)
        panel.set_title(f"{result['model']}, bf16 to {result['dtype']}, {result['ranks']} ranks", fontsize=9)
        panel.set_xlabel("seconds")
        panel.set_ylabel("memory / model")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def together(timelines: list[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Return (seconds, bytes of all ranks) from each rank's [ms, KiB held, KiB mapped]."""
    changes = sorted((point[0] / 1e3, rank, point[1] * 1024) for rank, line in enumerate(timelines) for point in line)
    now = [0.0] * len(timelines)
    times, held = [], []
    for seconds, rank, value in changes:
        now[rank] = value
        times.append(seconds)
        held.append(sum(now))
    return times, held
