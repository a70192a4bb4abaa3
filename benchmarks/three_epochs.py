"""Three epochs of the reference protocol, with and without exchange, over several seeds.

    python -m benchmarks.three_epochs --seeds 3      # trains what is missing, writes results/three_epochs.json
    python -m benchmarks.three_epochs --render       # rewrites README.md from the JSON

Arms are paired by seed: same initial towers, order of samples and split. The interval is Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mtl
from benchmarks.fast_path import CONFIG, METRICS, figure, interval
from benchmarks.render import write_page

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "three_epochs.json"
ARMS = ("unshared", "cross_stitch")


def measure(seeds: int) -> None:
    """Train every arm with every seed that the results lack; a result is on disk as soon as it is there."""
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(run["sharing"], run["seed"]) for run in runs}
    for seed in range(seeds):
        for arm in ARMS:
            if (arm, seed) in done:
                continue
            config = mtl.load_config(CONFIG, [f"sharing.kind={arm}", f"seed={seed}", "epochs=3"])
            result = mtl.train(config, progress=mtl.for_terminal())
            environment = json.loads((Path(result.run_dir) / "env.json").read_text())
            runs.append({**vars(result), "run_dir": Path(result.run_dir).name, "environment": environment})
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(runs, indent=1) + "\n")


def render() -> str:
    """The tables, from the JSON alone."""
    runs = json.loads(RESULTS.read_text())
    by_arm = {arm: sorted((run for run in runs if run["sharing"] == arm), key=lambda run: run["seed"]) for arm in ARMS}
    seeds = [run["seed"] for run in by_arm["unshared"]]
    assert seeds == [run["seed"] for run in by_arm["cross_stitch"]], "arms must have the same seeds"
    rows = ["| test accuracy | " + " | ".join(METRICS) + " | parameters |", "|---|" + "---|" * 4]
    for arm, arm_runs in by_arm.items():
        cells = [interval([figure(run, metric) for run in arm_runs]) for metric in METRICS]
        rows.append(f"| `{arm}` | {' | '.join(cells)} | {arm_runs[0]['parameters']:,} |")
    pairs = list(zip(by_arm["cross_stitch"], by_arm["unshared"], strict=True))
    differences = [interval([figure(a, metric) - figure(b, metric) for a, b in pairs], sign="+") for metric in METRICS]
    rows.append(f"| difference, paired | {' | '.join(differences)} | |")
    first = runs[0]
    environment = first["environment"]
    digests = ", ".join(f"{arm} {arm_runs[0]['config_digest']}" for arm, arm_runs in by_arm.items())
    return (
        "\n".join(rows)
        + f"\n\nMean over n = {len(seeds)} seeds ({', '.join(map(str, seeds))}) and 95 % Student-t interval. 55,000 training "
        "images, 5,000 held out to select the epoch, 10,000 test images read once. "
        f"{environment['device_name']}, {environment['threads']} threads, {first['precision']}, torch "
        f"{environment['versions']['torch']}; config digests of seed 0: {digests}.\n"
    )


def main() -> None:
    """Measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only rewrite README.md")
    args = parser.parse_args()
    if not args.render:
        measure(args.seeds)
    write_page()


if __name__ == "__main__":
    main()
