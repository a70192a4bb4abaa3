"""Gender and age of faces: two towers with and without cross-stitch units, on drawn faces or on VGGFace2.

    python examples/face_gender_age.py                              # faces of nobody, drawn on the first run; two minutes
    python examples/face_gender_age.py --data /path/to/vggface2     # train/, test/, identity_meta.csv in its variant with ages
    python examples/face_gender_age.py --data /path/to/vggface2 --ages ages.csv     # a table in it: path,age in years
    python examples/face_gender_age.py --data /path/to/vggface2 --maad MAAD_Face.csv     # three age groups instead of years

The drawn faces are synthetic: nothing measured on them says anything about people. VGGFace2 is for research, and neither label
is fit to decide about anybody: see the README's section on responsible use.
"""

import argparse
import sys
from pathlib import Path

import mtl


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gender and age of faces, with and without cross-stitch units.")
    parser.add_argument("--data", type=Path, help="folder of VGGFace2 (default: synthetic faces)")
    parser.add_argument("--ages", type=Path, help="table in that folder with columns path and age")
    parser.add_argument("--maad", type=Path, help="MAAD-Face's table in that folder; age is then one of three groups")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if (args.ages or args.maad) and not args.data:
        parser.error("--ages and --maad are tables in the folder that --data names")
    return args


def config(args: argparse.Namespace, sharing: object) -> mtl.RunConfig:
    """Only the sharing differs between the arms: same split by identity, order, initial towers and steps."""
    dataset, options = "synthetic_faces", {}
    if args.data is not None:
        dataset, options = "vggface2", {"folder": args.data.resolve()}
        options |= {"images": {"file": args.ages, "age": "age"}} if args.ages else {}
        options |= {"maad": args.maad} if args.maad else {}
    return mtl.RunConfig(
        tasks=[
            {"name": "face_gender", "dataset": dataset},
            {"name": "face_age", "dataset": dataset, "kind": "groups" if args.maad else "years"},
        ],
        backbone={"name": "small_cnn", "width": 0.5},
        sharing=sharing,
        data={"validation": 0.15, "augment": {"flip": True, "crop": 2}, "datasets": {dataset: options}},
        optim={"name": "adam", "lr": 2e-3, "schedule": "one_cycle"},
        epochs=args.epochs,
        batch_size=64,
        seed=args.seed,
    )


def report(args: argparse.Namespace, results: dict[str, mtl.RunResult]) -> None:
    age = "mae_classes" if args.maad else "mae_years"
    print(f"\n{'':<14}{'gender accuracy':>18}{'age ' + age:>18}{'mean score':>12}{'parameters':>13}{'time':>8}")
    scores = []
    for name, result in results.items():
        found = result.test or result.val  # a folder may have no test/
        assert found is not None
        gender, years = found["face_gender"]["accuracy"], found["face_age"][age]
        print(f"{name:<14}{gender:>18.4f}{years:>18.2f}{found['score']:>12.4f}{result.parameters:>13,}{result.seconds:>7.0f}s")
        scores.append(found["score"])
    gain = 100 * (scores[1] - scores[0])
    print(f"\ncross_stitch minus unshared, mean score: {gain:+.2f} points (n = 1 pair, seed {args.seed})")
    print("One seed proves nothing. For an answer: mtl compare examples/configs/face_gender_age.yaml --seeds 8")
    if args.data is None:
        print("Synthetic: these faces are drawn, and nothing measured on them says anything about people.")
    print("Runs: " + ", ".join(result.run_dir for result in results.values()))


def main() -> None:
    args = arguments()
    stitched = mtl.CrossStitch(points=("pool1", "pool2", "fc3"), init={"same": 0.9, "cross": 0.1})
    try:
        report(
            args,
            {
                name: mtl.train(config(args, sharing), progress=mtl.for_terminal())
                for name, sharing in (("unshared", mtl.Unshared()), ("cross_stitch", stitched))
            },
        )
    except mtl.MTLError as error:
        hint = "" if "target 'age" not in str(error) else "; no table says an age: give --ages FILE, or --maad FILE for groups"
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
