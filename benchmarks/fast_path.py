"""Does the fast path learn the same? Three epochs of the reference protocol, everything `auto` gives against plain fp32.

    python -m benchmarks.fast_path --seeds 5        # trains what is missing, writes results/fast_path.json

Fast: bf16 where the hardware computes in it, the execution that `auto` gives, compiled exchange. Plain: fp32, tower by tower,
nothing compiled. Both with cross-stitch units that start at 0.9 and 0.1, so that the exchange takes part from the first step.
Paired by seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mtl
from mtl.stats import estimate

HERE = Path(__file__).parent
CONFIG = HERE.parent / "examples" / "configs" / "fashion_two_task.yaml"
RESULTS = HERE / "results" / "fast_path.json"
METRICS = ("fashion_category", "fashion_group", "mean of tasks")
ARMS = {
    "fast": ["compile=units"],
    "plain": ["precision=fp32", "execution=towers", "compile=none"],
}
COMMON = ["epochs=3", "sharing.init={same: 0.9, cross: 0.1}"]


def measure(seeds: int) -> None:
    """Train both arms with every seed that the results lack; a result is on disk as soon as it is there."""
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(run["arm"], run["seed"]) for run in runs}
    for seed in range(seeds):
        for arm, overrides in ARMS.items():
            if (arm, seed) in done:
                continue
            config = mtl.load_config(CONFIG, [*COMMON, *overrides, f"seed={seed}"])
            result = mtl.train(config, progress=mtl.for_terminal())
            environment = json.loads((Path(result.run_dir) / "env.json").read_text())
            runs.append({"arm": arm, **vars(result), "run_dir": Path(result.run_dir).name, "environment": environment})
            RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


def render() -> str:
    """The table, from the JSON alone."""
    runs = json.loads(RESULTS.read_text())
    by_arm = {arm: sorted((run for run in runs if run["arm"] == arm), key=lambda run: int(run["seed"])) for arm in ARMS}
    seeds = [run["seed"] for run in by_arm["fast"]]
    assert seeds == [run["seed"] for run in by_arm["plain"]], "arms must have the same seeds"
    rows = ["| test accuracy | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    for arm, of in by_arm.items():
        rows.append(f"| {arm} ({of[0]['precision']}) | {' | '.join(interval([figure(r, m) for r in of]) for m in METRICS)} |")
    pairs = list(zip(by_arm["fast"], by_arm["plain"], strict=True))
    differences = [interval([figure(a, m) - figure(b, m) for a, b in pairs], sign="+") for m in METRICS]
    rows.append(f"| difference, paired | {' | '.join(differences)} |")
    environment = runs[0]["environment"]
    digests = ", ".join(f"{arm} {of[0]['config_digest']}" for arm, of in by_arm.items())
    return (
        "\n".join(rows) + f"\n\nMean over n = {len(seeds)} seeds ({', '.join(map(str, seeds))}) and 95 % Student-t interval; "
        f"10,000 test images. {environment['device_name']}, {environment['threads']} threads, torch "
        f"{environment['versions']['torch']}; config digests of seed 0: {digests}.\n"
    )


def figure(run: dict[str, Any], metric: str) -> float:
    """One test figure of a run."""
    return float(run["test"]["score"] if metric == "mean of tasks" else run["test"][metric]["accuracy"])


def interval(values: Sequence[float], sign: str = "") -> str:
    """`mean ± half width of the 95 % t interval`."""
    found = estimate(values)
    assert found.high is not None, "takes two seeds"
    return f"{found.mean:{sign}.4f} ± {found.high - found.mean:.4f}"


def main() -> None:
    """Measure what is missing, then render."""
    from benchmarks.render import write_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    measure(parser.parse_args().seeds)
    write_page()


if __name__ == "__main__":
    main()
