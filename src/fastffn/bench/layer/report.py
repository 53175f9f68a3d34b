"""A layer's measurement as a table for people, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from fastffn.convert.files import write_figure
from fastffn.nn import FFNConfig


def shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows for people: of each dense FFN only the faster way."""
    return [row for row in result["rows"] if row["role"] != "dense" or row["best"]]


def format_layer(result: dict[str, Any], *, tablefmt: str = "simple") -> str:
    """The result as a table for people."""
    several = result["dtype"] != "fp32"
    headers = ["tokens", "passes", "what", "ms", "quartiles", f"x dense {result['total_width']}", "bound"]
    headers += ["x any dtype"] if several else []
    rows = []
    for row in shown(result):
        seconds = row["seconds"]
        cells = [f"{row['tokens']:,}", row["passes"], row["name"], _ms(seconds["median"])]
        cells += [f"{_ms(seconds['low'])} to {_ms(seconds['high'])}", _ratio(row["ratio"]) if "ratio" in row else ""]
        cells += [_ratio(row["bound"]) if "bound" in row else ""]
        cells += [_ratio(row["ratio_any_dtype"]) if "ratio_any_dtype" in row else ""] if several else []
        rows.append(cells)
    align = ("right", "left", "left") + ("right",) * (len(headers) - 3)
    table = tabulate(rows, headers=headers, tablefmt=tablefmt, colalign=align, disable_numparse=True)
    config = {**result["ffn"]}
    ffn = ", ".join([result["kind"]] + [f"{k} {v}" for k, v in config.items() if k not in FFNConfig.MODEL_FIELDS])
    limits, machine = result["limits"], result["machine"]
    read = list(limits["read_bytes_per_second"].values())
    touched = limits["first_touch_bytes_per_second"]
    lines = [
        f"{ffn}; {config['d_model']} to {config['d_out']}, {config['activation']}, {result['dtype']} on "
        f"{result['device']}, {result['layers']} layer{'s' if result['layers'] > 1 else ''}",
        f"A token meets {result['active_width']:,} of {result['total_width']:,} neurons. {result['regime']}.",
        "",
        table,
        "",
        f"x dense {result['total_width']}: times as fast as the fastest dense FFN of as many neurons, eager, "
        "compiled or by oneDNN. bound: what multiply-adds, memory and page faults allow.",
        f"This machine: {limits['multiply_adds_per_second'] / 1e9:,.0f} G multiply-adds/s, reads "
        f"{max(read) / 1e9:,.0f} GB/s from caches and {min(read) / 1e9:,.0f} from memory"
        + (f", first touches {touched / 1e9:,.1f} GB/s of fresh memory." if touched else "."),
        *(f"Left out: {name}: {reason.rstrip('.')}." for name, reason in result["left_out"].items()),
        f"{machine['processor']}, {machine['threads']} threads, accelerator {machine['accelerator'] or 'none'}, torch "
        f"{machine['versions']['torch']}, commit {machine['commit'] or 'unknown'}",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def plot_layer(result: dict[str, Any], path: Path) -> None:
    """Ratio and bound over tokens, both axes logarithmic; one panel for each pass."""
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(row["passes"] for row in result["rows"]))
    figure = Figure(figsize=(6 * len(passes), 5), layout="constrained")
    panels = figure.subplots(1, len(passes), squeeze=False)[0]
    for axes, which in zip(panels, passes, strict=True):
        rows = [row for row in result["rows"] if row["passes"] == which and row["role"] != "dense" and "ratio" in row]
        for number, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
            line = [row for row in rows if row["name"] == name]
            tokens, color = [row["tokens"] for row in line], f"C{number}"
            axes.plot(tokens, [row["ratio"] for row in line], "o-", color=color, label=name)
            if line[0]["role"] == "ffn":
                axes.plot(tokens, [row["bound"] for row in line], "--", color=color, label=f"{name}: bound")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"times as fast as a dense FFN of {result['total_width']:,} neurons")
        axes.set_title(which)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    machine = result["machine"]
    figure.suptitle(
        f"{result['kind']}, {result['dtype']}, {result['layers']} layer(s), {machine['processor']}, "
        f"{machine['threads']} threads",
        fontsize="small",
    )
    write_figure(path, figure)
