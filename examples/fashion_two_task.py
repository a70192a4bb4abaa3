"""Does exchange between two towers help on Fashion-MNIST? Trains both arms under one budget and prints the comparison.

The protocol is that of the cross-stitch reference implementation: category (10 classes) and group (3 classes), a small CNN per
task, cross-stitch units after both pools and the fully connected layer, 30 epochs, Adam, the plain sum of the losses. Unlike
there, weights are selected on held-out training images and the test images are read once.

    python examples/fashion_two_task.py --quick     # both arms, a few minutes on two cores
    python examples/fashion_two_task.py             # the whole protocol
"""

import argparse
import sys

import mtl

FASHION, SHAPES = ["fashion_category", "fashion_group"], ["shapes_kind", "shapes_colour"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Two tasks on Fashion-MNIST, with and without cross-stitch units.")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=None, help="passes over the training images (default: 30; with --quick 2)"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--l2", type=float, default=1e-5, help="L2 on conv and fc weights, in the loss (default: %(default)s)")
    parser.add_argument(
        "--keep-prob", type=float, default=0.8, help="dropout keep probability after fc3 (default: %(default)s)"
    )
    parser.add_argument(
        "--cross-stitch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train only the arm with, or without (default: both)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 30 (12 on drawn shapes)")
    args = parser.parse_args()
    if not 0 < args.keep_prob <= 1:
        parser.error(f"--keep-prob {args.keep_prob} is not a probability above 0")
    return args


def config(args: argparse.Namespace, tasks: list[str], sharing: object) -> mtl.RunConfig:
    """The protocol for one arm. Only the sharing differs between arms: same split, order, initial towers and steps."""
    fashion = tasks == FASHION
    return mtl.RunConfig(
        tasks=tasks,
        backbone={"name": "small_cnn", "dropout": round(1 - args.keep_prob, 12)},
        sharing=sharing,
        data={"validation": 5000 if fashion else 0.1, "standardize": "pixel" if fashion else "channel"},
        optim={"name": "adam", "lr": args.lr, "l2": args.l2},
        epochs=args.epochs if args.epochs is not None else ((2 if fashion else 12) if args.quick else 30),
        batch_size=args.batch_size,
        seed=args.seed,
    )


def train_arms(args: argparse.Namespace, tasks: list[str]) -> dict[str, mtl.RunResult]:
    stitched = mtl.CrossStitch(points=("pool1", "pool2", "fc3"), granularity="channel", init="identity")
    arms = {"unshared": mtl.Unshared(), "cross_stitch": stitched}
    if args.cross_stitch is not None:
        arms = {name: sharing for name, sharing in arms.items() if (name == "cross_stitch") == args.cross_stitch}
    results = {}
    for name, sharing in arms.items():
        results[name] = mtl.train(config(args, tasks, sharing), progress=mtl.for_terminal())
    return results


def report(args: argparse.Namespace, tasks: list[str], results: dict[str, mtl.RunResult]) -> None:
    print(f"\n{'test accuracy':<14}" + "".join(f"{task:>18}" for task in tasks) + f"{'mean':>8}{'parameters':>13}{'time':>8}")
    for name, result in results.items():
        assert result.test is not None
        scores = "".join(f"{result.test[task]['accuracy']:>18.4f}" for task in tasks)
        print(f"{name:<14}{scores}{result.test['score']:>8.4f}{result.parameters:>13,}{result.seconds:>7.0f}s")
    any_result = next(iter(results.values()))
    if len(results) == 2:
        with_, without = (results[name].test["score"] for name in ("cross_stitch", "unshared"))  # type: ignore[index]
        gain = 100 * (with_ - without)
        print(f"\ncross_stitch minus unshared, mean of tasks: {gain:+.2f} points (n = 1 pair, seed {args.seed})")
        print("One seed proves nothing: differences of this size come and go with the seed. Repeat with --seed 1, 2, ...")
    left_out = [f"{30 - any_result.epochs} of the protocol's 30 epochs"] if any_result.epochs < 30 else []
    left_out += ["Fashion-MNIST itself (these are drawn shapes)"] if tasks == SHAPES else []
    if left_out:
        print(f"Left out: {'; '.join(left_out)}.")
    print("Runs: " + ", ".join(result.run_dir for result in results.values()) + "  (tensorboard --logdir runs)")


def main() -> None:
    args, tasks = arguments(), FASHION
    try:
        try:
            results = train_arms(args, tasks)
        except mtl.DataError as error:
            print(f"{error}. Running the same comparison on drawn shapes instead.", file=sys.stderr)
            tasks = SHAPES
            results = train_arms(args, tasks)
    except mtl.MTLError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    report(args, tasks, results)


if __name__ == "__main__":
    main()
