"""Copy results and figures from out/*/laptop/ to assets/, numbers of arrays with three digits: python docs/assets.py"""
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shorten(text):
    return float(f"{float(text):.3g}")


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
