"""`python -m benchmarks report`: results as tables and plots. Every number of the README's tables comes from here.

A result file holds one GPU's run; several are shown beside each other. What is called NAME goes between the lines
`<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->` of each page that has them.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

OURS = "jaxattn"
COLUMNS = {
    "jaxattn": "jaxattn",
    "jaxattn-separate": "jaxattn, an op each",
    "jaxattn-triton": "jaxattn, Triton",
    "flashinfer": "FlashInfer",
    "flashinfer-fused": "FlashInfer, one kernel",
    "flashinfer-cuda-cores": "FlashInfer, CUDA cores",
    "flashinfer-tensor-cores": "FlashInfer, tensor cores",
    "flashinfer-fa2": "FlashInfer FA2",
    "flashinfer-fa3": "FlashInfer FA3",
    "cudnn": "cuDNN",
    "tokamax": "tokamax",
    "jax": "JAX",
    "xla": "XLA",
}
RATE = {"prefill": "tflops"}  # every other op is judged by its bytes

# The seed's targets on an A100 80GB, TB/s, and what share of that GPU's peak they are.
A100_PEAK_TBPS = 2.04
SEED_TARGETS = {"prefill": 1.5, "decode": 1.6, "rmsnorm": 1.8, "rope": 1.5}

# Vendors' datasheets, TB/s of device memory.
PEAK_TBPS = {
    "NVIDIA H200": 4.8,
    "NVIDIA H100 80GB HBM3": 3.35,
    "NVIDIA H100 PCIe": 2.0,
    "NVIDIA A100-SXM4-80GB": 2.04,
    "NVIDIA A100 80GB PCIe": 1.935,
    "NVIDIA A100-SXM4-40GB": 1.555,
    "NVIDIA B200": 8.0,
    "NVIDIA L40S": 0.864,
    "NVIDIA GeForce RTX 4090": 1.008,
}

KEPT = Path(__file__).parent / "results"

Row = dict[str, Any]
Key = tuple[Any, ...]
Results = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", type=Path, nargs="*", help="JSON files of runs, one a GPU; default: those kept"
    )
    parser.add_argument(
        "--readme", type=Path, nargs="+", metavar="FILE", help="fill these files' marked tables"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNG files there")
    parser.add_argument(
        "--peak-tbps", type=float, help="the one GPU's peak memory bandwidth; default: by its name"
    )


def main(options: argparse.Namespace) -> int:
    runs = read(options.results)
    if options.peak_tbps and len(runs) > 1:
        raise ValueError(
            f"--peak-tbps must be that of one result file's GPU; got {len(runs)} files"
        )
    tables = make_tables(runs, options.peak_tbps)
    for page in options.readme or ():
        page.write_text(fill(page.read_text(), tables))
    if not options.readme:
        print("\n\n".join(f"### {name}\n\n{table}" for name, table in tables.items()))
    if options.plots:
        from benchmarks.plots import draw

        for stem, results in runs.items():
            draw(results, options.plots, stem=stem)
    return 0


def read(paths: Sequence[Path] = ()) -> dict[str, Results]:
    """{a file's stem: what it holds}; without paths, the runs that are kept, from the last name on."""
    paths = paths or sorted(KEPT.glob("*.json"), reverse=True)
    if len({path.stem for path in paths}) < len(paths):
        raise ValueError(f"result files must differ in name, which plots bear; got {paths}")
    return {path.stem: json.loads(path.read_text()) for path in paths}


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with every marked table replaced; a table whose markers are missing is left out."""
    for name, table in tables.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def make_tables(runs: dict[str, Results], peak_tbps: float | None = None) -> dict[str, str]:
    """Markdown by name, of runs by their files' stems; what would be empty is left out."""
    peaks = {stem: peak_tbps or PEAK_TBPS.get(run["meta"]["gpu"]) for stem, run in runs.items()}
    tables = {"machine": _machine(runs, peaks), "plots": _plots(runs)}
    own = [(run["meta"]["gpu"], _tables_of(run)) for run in runs.values()]
    for name in dict.fromkeys(name for _, of_one in own for name in of_one):
        parts = [f"**{gpu}**\n\n{of_one[name]}" for gpu, of_one in own if name in of_one]
        tables[name] = "\n" + "\n\n".join(parts) + "\n"
    if targets := _targets(runs, peaks):
        tables["targets"] = targets
    return tables


def _tables_of(results: Results) -> dict[str, str]:
    """The tables that speak of one run."""
    cases = by_case(results["rows"])
    tables = {}
    if summary := _summary(cases):
        tables["summary"] = summary
    if loops := _loops(cases):
        tables["decode_loop"] = loops
    if plans := _plans(cases):
        tables["plan_decode"] = plans
    for name, ops in {
        "decode": ["decode"],
        "decode_step": ["decode_step"],
        "prefill": ["prefill"],
        "append": ["append"],
        "merge_states": ["merge_states"],
        "rmsnorm": ["rmsnorm", "fused_add_rmsnorm"],
        "rope": ["rope"],
        "rope_append": ["rope_append"],
        "sampling": ["sampling"],
        "grouped_matmul": ["grouped_matmul"],
        "activation": ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"],
    }.items():
        own = {key: rows for key, rows in cases.items() if key[0] in ops}
        if own:
            tables[name] = _cases(own)
    if absent := _absent(results):
        tables["not_timed"] = absent
    return tables


def by_case(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """{(op, case, page size, dtype): {provider: its row}}, in the order of the file."""
    cases: dict[Key, dict[str, Row]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["page_size"], row["dtype"])
        cases.setdefault(key, {})[row["provider"]] = row
    return cases


def best_flashinfer(rows: dict[str, Row], provider: str = "flashinfer") -> Row | None:
    """The fastest of FlashInfer's kernels at a case, or of those whose name begins with `provider`."""
    timed = [row for name, row in rows.items() if name.startswith(provider) and row["ok"]]
    return min(timed, key=lambda row: row["us"], default=None)


def speed_up(rows: dict[str, Row], provider: str = "flashinfer") -> float | None:
    """How many times as fast as FlashInfer this library is at a case."""
    ours, theirs = rows.get(OURS), best_flashinfer(rows, provider)
    return theirs["us"] / ours["us"] if ours and ours["ok"] and theirs else None


def label(key: Key, rows: dict[str, Row]) -> str:
    """A case in words: name, heads, page size, dtype where it is not bfloat16."""
    op, name, page_size, dtype = key
    row = next(iter(rows.values()))
    parts = [name]
    if op in ("decode", "decode_step", "plan_decode", "prefill"):
        parts.append(f"{row['num_qo_heads']}/{row['num_kv_heads']}")
        parts.append(f"p{page_size}" if page_size else "contiguous")
    elif page_size:
        parts.append(f"p{page_size}")
    if dtype not in ("bfloat16", "int32"):  # int32: a plan, which has no other
        parts.append(dtype)
    return " ".join(parts)


def _cases(cases: dict[Key, dict[str, Row]]) -> str:
    """A line a case: our time, rate and share of the roof, the others' times, and the speed-up."""
    ops = list(dict.fromkeys(key[0] for key in cases))
    present = {name for rows in cases.values() for name in rows}
    others = [name for name in COLUMNS if name in present and name != OURS]
    rate = RATE.get(ops[0], "gbps")
    # FA2 and FA3 are different algorithms: each is compared.
    rivals = ["flashinfer-fa2", "flashinfer-fa3"] if ops == ["prefill"] else ["flashinfer"]
    rivals = [r for r in rivals if any(name.startswith(r) for name in present)]
    head = ["op"] * (len(ops) > 1) + ["case", "us"]
    head += ["TFLOP/s" if rate == "tflops" else "TB/s", "of roof"]
    head += [f"{COLUMNS[name]}, us" for name in others]
    head += [f"speed-up over {COLUMNS[name]}" for name in rivals]
    lines = []
    for key, rows in cases.items():
        ours = rows.get(OURS)
        line = [key[0]] * (len(ops) > 1) + [label(key, rows), _us(ours)]
        if ours and ours["ok"]:
            line += [
                f"{ours['tflops']:.0f}" if rate == "tflops" else f"{ours['gbps'] / 1e3:.2f}",
                f"{ours['roof_share']:.0%}",
            ]
        else:
            line += ["–", "–"]
        line += [_us(rows.get(name)) for name in others]
        line += [_ratio(speed_up(rows, name)) for name in rivals]
        lines.append(line)
    return _markdown(head, lines)


def _loops(cases: dict[Key, dict[str, Row]]) -> str:
    """A line a decode loop: a step by the clock, what of it is not kernels, and what fused ops gain. Maybe empty."""
    lines = []
    for key, rows in cases.items():
        ours, apart = rows.get(OURS), rows.get("jaxattn-separate")
        if key[0] == "decode_loop" and ours and ours["ok"]:
            line = [
                label(key, rows),
                _us(ours),
                f"{ours['kernel_us']:.0f}",
                str(ours["kernels"]),
                f"{ours['us'] / ours['kernel_us'] - 1:+.1%}",
                f"{ours['gbps'] / 1e3:.2f}",
                f"{ours['roof_share']:.0%}",
                _us(apart),
            ]
            if apart and apart["ok"]:
                line += [str(apart["kernels"]), f"{apart['us'] / ours['us'] - 1:+.1%}"]
            else:
                line += ["–", "–"]
            lines.append(line)
    head = ["case", "us a step, wall clock", "us of kernels", "kernels", "beyond kernels"]
    head += ["TB/s", "of roof", "an op each, us a step", "its kernels", "more time"]
    return _markdown(head, lines) if lines else ""


def _plans(cases: dict[Key, dict[str, Row]]) -> str:
    """A line a plan: no roof bounds it. Maybe empty."""
    lines = [
        [label(key, rows), _us(rows[OURS]), str(rows[OURS]["kernels"])]
        for key, rows in cases.items()
        if key[0] == "plan_decode" and rows[OURS]["ok"]
    ]
    return _markdown(["case", "us", "kernels"], lines) if lines else ""


def _summary(cases: dict[Key, dict[str, Row]]) -> str:
    """A line an op: speed-ups over FlashInfer's better kernel; over each of FA2 and FA3 for prefill. Maybe empty."""
    lines = []
    for op in dict.fromkeys(key[0] for key in cases):
        for rival in ("flashinfer-fa2", "flashinfer-fa3") if op == "prefill" else ("flashinfer",):
            ratios = {
                label(key, rows): ratio
                for key, rows in cases.items()
                if key[0] == op and (ratio := speed_up(rows, rival)) is not None
            }
            if not ratios:
                continue
            worst, best = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
            lines.append(
                [
                    op,
                    COLUMNS[rival],
                    f"{sum(r >= 1 for r in ratios.values())} of {len(ratios)}",
                    _ratio(statistics.geometric_mean(ratios.values())),
                    f"{_ratio(ratios[worst])} ({worst})",
                    f"{_ratio(ratios[best])} ({best})",
                ]
            )
    head = ["op", "against", "as fast or faster in", "geometric mean of speed-ups"]
    return _markdown([*head, "least", "most"], lines) if lines else ""


def _targets(runs: dict[str, Results], peaks: dict[str, float | None]) -> str:
    """The seed's targets as a share of each GPU's peak bandwidth, and the best case of ours there. Maybe empty."""
    lines = []
    for op, target in SEED_TARGETS.items():
        share = target / A100_PEAK_TBPS
        for stem, run in runs.items():
            ours = {
                label(key, rows): rows[OURS]["gbps"] / 1e3
                for key, rows in by_case(run["rows"]).items()
                if key[0] == op and OURS in rows and rows[OURS]["ok"]
            }
            peak = peaks[stem]
            if not ours or not peak:
                continue
            case = max(ours, key=ours.__getitem__)
            lines.append(
                [
                    op,
                    f"{target} TB/s, {share:.0%}",
                    run["meta"]["gpu"],
                    f"{share * peak:.2f} of {peak} TB/s",
                    f"{ours[case]:.2f} TB/s, {ours[case] / peak:.0%} ({case})",
                    "met" if ours[case] >= share * peak else "missed",
                ]
            )
    head = ["kernel", f"target, of an A100's {A100_PEAK_TBPS} TB/s", "GPU", "the same share of it"]
    return _markdown([*head, "best case", "verdict"], lines) if lines else ""


def _machine(runs: dict[str, Results], peaks: dict[str, float | None]) -> str:
    """A column a GPU: what ran there, and the ceilings that were measured."""
    columns = []
    for stem, run in runs.items():
        meta = run["meta"]
        ceilings, peak = meta["ceilings"], peaks[stem]
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        columns.append(
            {
                "driver": str(meta["driver"]),
                "software": versions,
                "measured": f"{meta['date'][:10]}, `{meta['command']}`, {meta['seconds']:.0f} s",
                "device copy, read + write": f"{ceilings['copy_gbps'] / 1e3:.2f} TB/s",
                "sum of an array, read": f"{ceilings['read_gbps'] / 1e3:.2f} TB/s",
                "bfloat16 matrix product": f"{ceilings['matmul_tflops']:.0f} TFLOP/s",
                "peak memory bandwidth, datasheet": f"{peak} TB/s" if peak else "–",
            }
        )
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return _markdown(["GPU", *(run["meta"]["gpu"] for run in runs.values())], lines)


def _plots(runs: dict[str, Results]) -> str:
    """The plots of each run, as the README links them."""
    plots = dict(roofline="Share of the roof by case", speedup="Speed-up over FlashInfer")
    plots["decode_step"] = "Decode step latency"
    return "\n".join(
        f"![{title}, {run['meta']['gpu']}](benchmarks/results/{stem}_{plot}.png)"
        for plot, title in plots.items()
        for stem, run in runs.items()
        if plot != "decode_step" or any(row["op"] == plot for row in run["rows"])
    )


def _absent(results: Results) -> str:
    """What ran and was not timed, with the reason; empty if nothing."""
    lines = [
        [row["op"], row["case"], row["provider"], row["failure"].replace("|", "/")]
        for row in results["rows"]
        if not row["ok"]
    ]
    for name, reason in results["meta"]["failures"].items():
        op, *case = name.split("/")
        lines.append([op, "/".join(case), "all", reason.replace("|", "/")])
    return _markdown(["op", "case", "provider", "why"], lines) if lines else ""


def _us(row: Row | None) -> str:
    if row is None:
        return "–"
    if not row["ok"]:
        return "not timed"
    us = row["us"]
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}x"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
