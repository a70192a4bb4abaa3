"""An own dataset and two own tasks, trained together: python examples/custom_task.py

The data are stripes: one task tells their direction, the other how fine they are. Replace `stripes` by whatever reads yours.
"""

from pathlib import Path

import numpy as np

import mtl


@mtl.register_dataset("stripes")
def stripes(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    random = np.random.default_rng(0 if split == mtl.Split.TRAIN else 1)
    n = 2000 if split == mtl.Split.TRAIN else 500
    direction, fineness = random.integers(0, 4, n), random.integers(0, 3, n)
    y, x = np.mgrid[0:16, 0:16]
    angle = (direction * np.pi / 4 + random.normal(0, 0.2, n))[:, None, None]
    waves = np.sin((1.0 + 0.4 * fineness)[:, None, None] * (np.cos(angle) * x + np.sin(angle) * y))
    images = np.clip(128 + 60 * waves + random.normal(0, 50, (n, 16, 16)), 0, 255).astype(np.uint8)
    return mtl.ArrayDataset(images, labels={"direction": direction, "fineness": fineness})


@mtl.register_task("stripes_direction")
def stripes_direction() -> mtl.Task:
    return mtl.Task("stripes", "direction", mtl.Classification(("|", "/", "-", "\\")))


@mtl.register_task("stripes_fineness")
def stripes_fineness() -> mtl.Task:
    return mtl.Task("stripes", "fineness", mtl.Classification(("coarse", "medium", "fine")))


if __name__ == "__main__":
    tasks, data = ["stripes_direction", "stripes_fineness"], {"validation": 0.1}
    config = mtl.RunConfig(tasks=tasks, backbone="small_cnn", sharing=mtl.CrossStitch(), data=data, epochs=5)
    result = mtl.train(config, progress=mtl.for_terminal())
    print(f"test score {result.test['score']:.3f}; files in {result.run_dir}" if result.test else result)
