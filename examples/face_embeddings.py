"""The cross-stitch reference's second experiment: gender and age group from embeddings of faces, with and without stitches.

    python examples/face_embeddings.py                      # writes a stand-in for the embeddings, then 800 epochs, both arms
    python examples/face_embeddings.py --file mine.npz      # yours: arrays features (N, D), gender (N,), age_group (N,)

Without a file, 2,000 faces are drawn (nobody's, see synthetic_faces) and their pixels projected at random to 128 numbers: a
stand-in with the shapes of embeddings, not embeddings. Nothing measured on it says anything about people.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import mtl

CONFIG = Path(__file__).parent / "configs" / "face_embeddings.yaml"
FACES, DIMENSIONS = 2000, 128
GROUPS = ("below 30", "30 to 49", "50 and above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gender and age group from embeddings, with and without cross-stitch units.")
    parser.add_argument("--file", type=Path, help=".npz or .safetensors (default: a synthetic stand-in)")
    parser.add_argument("--epochs", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def write_stand_in(file: Path) -> None:
    """Drawn faces, two of each person, their pixels projected to 128 numbers and scaled to length 1."""
    from mtl_tasks.synthetic_faces import Person

    random = np.random.default_rng(0)
    pixels, gender, age, person = [], [], [], []
    for i in range(FACES):
        if i % 2 == 0:
            someone = Person(random)
        picture, years, box = someone.picture(random)
        left, top, width, height = box
        face = picture.crop((left, top, left + width, top + height)).resize((24, 32))
        pixels.append(np.asarray(face, np.float32).ravel() / 255 - 0.5)
        gender.append(("female", "male")[someone.male])
        age.append(GROUPS[int(np.searchsorted([30, 50], years, side="right"))])
        person.append(i // 2)
    projected = np.stack(pixels) @ random.normal(size=(pixels[0].size, DIMENSIONS)).astype(np.float32)
    features = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, features=features, gender=np.array(gender), age_group=np.array(age), person=np.array(person))


def main() -> None:
    args = arguments()
    file = (args.file or Path("data/synthetic_embeddings.npz")).resolve()
    changes = [f"epochs={args.epochs}", f"seed={args.seed}", f"data.datasets.vectors.file={file}"]
    try:
        if args.file is None:
            print("Synthetic: drawn faces, their pixels projected at random; not embeddings of anybody.", file=sys.stderr)
            changes += ["data.datasets.vectors.targets=[gender, age_group]", "data.datasets.vectors.group=person"]
            if not file.is_file():
                write_stand_in(file)
        stitched = mtl.load_config(CONFIG, changes)
        arms = {"unshared": stitched.replaced(sharing=mtl.Unshared()), "cross_stitch": stitched}
        results = {name: mtl.train(config, progress=mtl.for_terminal()) for name, config in arms.items()}
    except mtl.MTLError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"\n{'test accuracy':<14}{'gender':>10}{'age group':>12}{'mean':>8}{'time':>8}")
    for name, result in results.items():
        found = result.test or result.val
        assert found is not None
        gender, age = found["gender"]["accuracy"], found["age_group"]["accuracy"]
        print(f"{name:<14}{gender:>10.4f}{age:>12.4f}{found['score']:>8.4f}{result.seconds:>7.0f}s")
    print("One seed, and 200 test rows: differences of a few points mean nothing here. mtl compare says what does.")


if __name__ == "__main__":
    main()
