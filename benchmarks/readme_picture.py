"""Draw the README's picture: memory and time of a training step, with BatchNorm and without.

    python benchmarks/readme_picture.py

Reads `results/cpu/batchnorm_cost_*.jsonl` and measures nothing; writes one SVG for a light and one
for a dark background into `docs/images/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
IMAGES = ROOT / "docs" / "images"

PROVIDERS = {"batchnorm": "BatchNorm", "czm_fused_noise": "czm-fused"}
NETWORKS = {"resnet20": "ResNet20", "resnet110": "ResNet110"}
PANELS = {
    "peak_bytes": ("Peak memory of a training step, MB", 1e6, "{:.0f} MB"),
    "step": ("Time of a training step on a CPU, s", 1e6, "{:.2f} s"),
}


class Theme(NamedTuple):
    """The colours of a picture on one kind of background, which stays transparent."""

    text: str
    grid: str
    bars: dict[str, str]


THEMES = {
    "light": Theme("#1f2328", "#d1d9e0", {"batchnorm": "#8c959f", "czm_fused_noise": "#00897b"}),
    "dark": Theme("#e6edf3", "#3d444d", {"batchnorm": "#7d8590", "czm_fused_noise": "#26c6a6"}),
}


def read_values(model: str) -> tuple[dict[tuple[str, str], float], int]:
    """Return the measured values of `model` by provider and metric, and the batch size of all."""
    lines = (RESULTS / f"batchnorm_cost_{model}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["provider"] in PROVIDERS and row["metric"] in PANELS]
    (batch,) = {row["config"]["batch"] for row in rows}
    return {(row["provider"], row["metric"]): row["p50"] for row in rows}, batch


def draw(theme: Theme, path: Path) -> None:
    """Draw both panels in the colours of `theme` into the SVG file `path`."""
    settings = {
        "font.size": 10,
        "svg.fonttype": "path",
        "svg.hashsalt": "czm-fused",
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
    }
    with plt.rc_context(settings):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 2.3), layout="constrained")
        labels = []
        for place, (model, title) in enumerate(NETWORKS.items()):
            values, batch = read_values(model)
            labels.append(f"{title}\nbatch {batch}")
            for axis, (metric, (_, unit, form)) in zip(axes, PANELS.items(), strict=True):
                for offset, provider in zip((-0.2, 0.2), PROVIDERS, strict=True):
                    value = values[provider, metric] / unit
                    share = values[provider, metric] / values["batchnorm", metric]
                    text = form.format(value) + ("" if share == 1 else f", {share:.0%}")
                    bars = axis.barh(place + offset, value, 0.36, color=theme.bars[provider])
                    axis.bar_label(bars, [text], padding=4)
        for axis, (title, _, _) in zip(axes, PANELS.values(), strict=True):
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_yticks(range(len(labels)), labels)
            axis.invert_yaxis()
            axis.set_xlim(left=0)
            axis.margins(x=0.35)
            axis.grid(axis="x", color=theme.grid)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        axes[1].set_yticklabels([])
        handles = [
            plt.Rectangle((0, 0), 1, 1, color=theme.bars[provider]) for provider in PROVIDERS
        ]
        figure.legend(
            handles, PROVIDERS.values(), loc="outside lower center", ncols=2, frameon=False
        )
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plt.switch_backend("svg")
    IMAGES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        draw(theme, IMAGES / f"step_cost_{name}.svg")


if __name__ == "__main__":
    main()
