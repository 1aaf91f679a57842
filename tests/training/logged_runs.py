"""Runs that were never trained: just the files that a complete run leaves for others to read."""

import json

from czm_fused.training import Config

QUANTILES = ("min", "p05", "p25", "p50", "p75", "p95", "max")


def record(epoch, accuracy, **more):
    norms = {name: 0.5 + 0.1 * place for place, name in enumerate(QUANTILES)}
    return {
        "epoch": epoch,
        "train_accuracy": accuracy + 1.0,
        "test_accuracy": accuracy,
        "filter_norms": norms,
        **more,
    }


def write_run(folder, given, accuracies, more=({},)):
    """Write a run whose epochs had these test accuracies; `more` goes into their records."""
    values = {"depth": 8, "epochs": len(accuracies), **given, "out": str(folder)}
    config = Config(**values)
    more = list(more) * (len(accuracies) // len(more))
    records = [record(i, a, **m) for i, (a, m) in enumerate(zip(accuracies, more, strict=True), 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = {**config.as_dict(), "test_accuracy": accuracies[-1], "seconds": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return records
