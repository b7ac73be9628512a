"""What is written: JSON, the markdown tables made from it, plots, and the page that the tables are pasted into."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from scripts.policies import compared, label

BEGIN, END = "<!-- scripts/bench.py: begin -->", "<!-- scripts/bench.py: end -->"
MARKERS = {
    "cpu": (BEGIN, END),
    "cuda": ("<!-- scripts/bench.py --device cuda: begin -->", "<!-- scripts/bench.py --device cuda: end -->"),
}


def write_json(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def cell(value: Any) -> str:
    """A value of the JSON as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value >= 1000:
            return f"{value:,.0f}"
        return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(results: dict[str, Any]) -> str:
    """All sections as tables; every number in them is one of `results`."""
    meta = results["meta"]
    on = "" if meta.get("cuda") is None else f"{meta['device']}, CUDA {meta['cuda']}, Triton {meta['triton']}; "
    threads = f"{meta['threads']} thread{'s' if meta['threads'] != 1 else ''} a process"
    lines = [
        *_wrapped(
            f"{on}{meta['date']}, torch {meta['torch']}, dist_clip {meta['dist_clip']}, zclip {meta['zclip']}, "
            f"pytorch_optimizer {meta['pytorch_optimizer']}, Python {meta['python']}; {meta['processor']}, "
            f"{meta['cores']} cores, {threads}. Load average between "
            f"{cell(meta['load_low'])} and {cell(meta['load_high'])}{' (busy)' if meta['busy'] else ''}."
        ),
        "",
    ]
    for section in results["sections"].values():
        lines += table(section)
    return "\n".join(lines).rstrip() + "\n"


def table(section: dict[str, Any]) -> list[str]:
    columns = section["columns"]
    facts = "; ".join(f"{key.replace('_', ' ')}: {cell(value)}" for key, value in section["facts"].items())
    lines = [f"### {section['title']}", "", *_wrapped(f"{section['about']} ({facts}.)"), ""]
    lines.append("| " + " | ".join(columns.values()) + " |")
    lines.append("|" + "|".join("---" if key in ("name", "mesh") else "--:" for key in columns) + "|")
    lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in section["rows"]]
    return [*lines, ""]


def _wrapped(text: str) -> list[str]:
    """Lines of prose as the pages have them."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def paste(text: str, page: Path, device: str) -> None:
    """Put `text` between the page's markers for the device."""
    begin, end = MARKERS[device]
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """A plot for each section that has one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    sections, written = results["sections"], []
    local = [sections[key] for key in ("gpt2", "small", "large") if key in sections]
    if local:
        figure, axes = plt.subplots(1, len(local), figsize=(4 * len(local) + 2, 5), sharey=True, squeeze=False)
        for axis, section in zip(axes[0], local, strict=True):
            rows = section["rows"][::-1]
            colours = ["tab:grey" if not _ours(row["name"]) else "tab:blue" for row in rows]
            axis.barh([row["name"] for row in rows], [row["cpu_ratio"] for row in rows], color=colours)
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_title(section["title"], fontsize=10)
            axis.set_xlabel("CPU time, torch's clip_grad_norm_ = 1")
        written.append(_save(figure, folder / "bench-local.png"))
    if "dtensor" in sections:
        rows = sections["dtensor"]["rows"]
        meshes = list(dict.fromkeys(row["mesh"] for row in rows))
        names = list(dict.fromkeys(row["name"] for row in rows))
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for axis, key, title in ((axes[0], "first_cpu_ms", "first call"), (axes[1], "cpu_ms", "steady step")):
            for k, name in enumerate(names):
                heights = [row[key] for row in rows if row["name"] == name]
                width = 0.8 / len(names)
                axis.bar([i + width * k for i in range(len(meshes))], heights, width=width, label=name)
            axis.set_xticks([i + 0.4 - width / 2 for i in range(len(meshes))], meshes, fontsize=8)
            axis.set_yscale("log")
            axis.set_ylabel("CPU time, ms (log)")
            axis.set_title(f"{sections['dtensor']['title']}, {title}", fontsize=10)
        axes[0].legend(fontsize=7)
        written.append(_save(figure, folder / "bench-dtensor.png"))
    if "tensor_parallel" in sections:
        rows = sections["tensor_parallel"]["rows"]
        figure, axis = plt.subplots(figsize=(7, 3.5))
        labels = [f"{row['name']}, {row['processes']} processes" for row in rows][::-1]
        axis.barh(labels, [row["wall_ms"] for row in rows][::-1])
        axis.set_xscale("log")
        axis.set_xlabel("ms (log)")
        axis.set_title(sections["tensor_parallel"]["title"], fontsize=10)
        written.append(_save(figure, folder / "bench-tensor-parallel.png"))
    return written


def _ours(name: str) -> bool:
    return name.startswith(("dist_clip", *map(label, compared())))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path
