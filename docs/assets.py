"""Copy results and figures from out/*/laptop/ to assets/, numbers of arrays with three digits: python docs/assets.py

The targets of exp_freedom.py are compared, too, if they were run: --target sampled --out out/exp_freedom/sampled, and
the same with faiss.
"""
import json
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


# of calibrated l2, below which a sample is called a copy
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)


def shorten(text):
    return float(f"{float(text):.3g}")


def compare_targets():
    """Return rows of each target of exp_freedom.py, and the fraction of copies of its SiT (thresholds, ratios)."""
    found = {}
    for path in sorted((ROOT / "out" / "exp_freedom").glob("*/results.json")):
        results = json.loads(path.read_text())
        l2 = np.array(results["arrays"]["sit"]["l2"])[:, :, -1]                      # (ratios, seeds, n)
        copies = [(l2 < threshold).mean((1, 2)).round(3).tolist() for threshold in THRESHOLDS]
        rows = {row["id"]: row for row in results["claims"]}
        found[results["config"]["target"]] = dict(rows=rows, copies=copies, ratios=results["config"]["ratios"])
    return dict(thresholds=THRESHOLDS, targets=found)


if __name__ == "__main__":
    for folder in sorted((ROOT / "out").glob("exp_*/laptop")):
        script = folder.parent.name
        text = (folder / "results.json").read_text()
        results = json.loads(text)
        arrays = json.dumps(results["arrays"]).replace("true", "1").replace("false", "0")
        results["arrays"] = json.loads(arrays, parse_float=shorten)
        (ROOT / "assets" / f"{script}.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
        for picture in folder.glob("fig*.png"):
            shutil.copy(picture, ROOT / "assets")
    comparison = compare_targets()
    if len(comparison["targets"]) > 1:
        (ROOT / "assets" / "targets.json").write_text(json.dumps(comparison) + "\n")
