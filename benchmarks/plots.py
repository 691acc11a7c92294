"""Plots of a result file: share of the roof, speed-up over FlashInfer, decode step latency."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend must be chosen first

from benchmarks.report import OURS, Key, Row, best_flashinfer, by_case, label, speed_up  # noqa: E402

OUR_COLOR, THEIR_COLOR, OTHER_COLOR = "#2f6fdb", "#e08a1e", "#8a8a8a"
Cases = dict[Key, dict[str, Row]]


def draw(results: dict[str, Any], folder: Path, stem: str) -> None:
    """Writes STEM_roofline.png, STEM_speedup.png and STEM_decode_step.png."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = by_case(results["rows"])
    # Loops and plans are this library's alone, and no roof bounds a plan.
    cases = {k: rows for k, rows in cases.items() if k[0] not in ("decode_loop", "plan_decode")}
    kernels = {key: rows for key, rows in cases.items() if key[0] != "decode_step"}
    steps = {key: rows for key, rows in cases.items() if key[0] == "decode_step"}
    gpu = results["meta"]["gpu"]
    figures = {
        "roofline": _bars(kernels, f"Share of the roof, {gpu}", _roof_bars),
        "speedup": _bars(cases, f"Speed-up over FlashInfer's best kernel, {gpu}", _ratio_bars),
        "decode_step": _steps(steps, f"Decode step: plan and 32 layers of attention, {gpu}"),
    }
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{stem}_{name}.png", dpi=120)
            plt.close(figure)


def _bars(cases: Cases, title: str, fill: Any) -> Any:
    """A panel an op, a group of bars a case."""
    ops: dict[str, Cases] = {}
    for key, rows in cases.items():
        ops.setdefault(key[0], {})[key] = rows
    columns = 2
    # Pair long panels with long ones.
    panels = sorted(ops.items(), key=lambda item: -len(item[1]))
    heights = [1 + 0.28 * len(panels[i][1]) for i in range(0, len(panels), columns)]
    if not heights:
        return None
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(14, 1 + sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (op, own) in zip(axes.flat, panels):
        fill(axis, own)
        axis.set_yticks(range(len(own)), [label(*item) for item in own.items()], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(op, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _roof_bars(axis: Any, cases: Cases) -> None:
    def share(row: Row | None) -> float:
        return row["roof_share"] if row and row["ok"] else 0

    ours = [share(rows.get(OURS)) for rows in cases.values()]
    theirs = [share(best_flashinfer(rows)) for rows in cases.values()]
    place = range(len(cases))
    axis.barh([y - 0.2 for y in place], ours, 0.38, color=OUR_COLOR, label=OURS)
    axis.barh([y + 0.2 for y in place], theirs, 0.38, color=THEIR_COLOR, label="FlashInfer")
    axis.axvline(1, color=OTHER_COLOR, linewidth=0.8)
    axis.set_xlim(0, 1.1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(fontsize=8, loc="lower right")


def _ratio_bars(axis: Any, cases: Cases) -> None:
    ratios = [speed_up(rows) or 0 for rows in cases.values()]
    colors = [OUR_COLOR if ratio >= 1 else THEIR_COLOR for ratio in ratios]
    bars = axis.barh(range(len(cases)), ratios, 0.7, color=colors)
    axis.bar_label(bars, [f"{r:.2f}" if r else "–" for r in ratios], fontsize=7, padding=2)
    axis.axvline(1, color=OTHER_COLOR, linewidth=0.8)
    axis.set_xlim(0, 1.15 * max([1.0, *ratios]))


def _steps(cases: Cases, title: str) -> Any:
    """Latency against batch at each length, and against length at each batch; a line has three points or more."""
    points: dict[str, dict[tuple[int, int], float]] = {}
    for (_, name, page_size, _), rows in cases.items():
        if (shape := re.fullmatch(r"b(\d+)_(\d+)k", name)) and page_size == 16:
            for provider, row in rows.items():
                if row["ok"]:
                    batch, length = int(shape[1]), 1024 * int(shape[2])
                    points.setdefault(provider, {})[batch, length] = row["us"] / 1e3
    if not points:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    styles = {OURS: OUR_COLOR, "flashinfer-tensor-cores": THEIR_COLOR}
    for axis, (varied, fixed) in zip(axes, ((0, 1), (1, 0))):
        for provider, values in points.items():
            lines: dict[int, list[tuple[int, float]]] = {}
            for at, ms in values.items():
                lines.setdefault(at[fixed], []).append((at[varied], ms))
            for value, line in lines.items():
                if len(line) >= 3:
                    what = f"{value} tokens" if fixed else f"batch {value}"
                    axis.plot(
                        *zip(*sorted(line)),
                        marker="o",
                        color=styles.get(provider, OTHER_COLOR),
                        label=f"{provider}, {what}",
                    )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel(("batch", "tokens in the cache of each request")[varied])
        axis.set_ylabel("ms per step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    return figure
