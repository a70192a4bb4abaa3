"""`synthetic_faces`: drawn faces in the layout of VGGFace2, so that everything about faces runs anywhere.

Nobody is shown. A face is drawn from its identity (sex label, base age, colours, proportions) and from the image's own age,
pose, light, expression and dress, by rules that are made up. Gender shows in jaw, brows, lips, hair and beards; age in grey
hair, receding hair, lines and cheeks; and they get into each other's way: beards and fringes hide lines, hair is dyed, some
hair is long or short against the rule, long hair hides the jaw.

Synthetic: nothing measured on it says anything about people, or about pictures of people.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

import mtl
from mtl_tasks.face_labels import GENDERS, MAAD_GROUPS, META, PerImage
from mtl_tasks.vggface2 import BOXES, FacesOptions, faces

HEIGHT, WIDTH = 88, 72
"""Of a picture, pixels: loosely cropped, as VGGFace2's are."""
FINE = 3
"""A picture is drawn this many times as large, and brought down."""
DRAWING = 1
"""Of the rules by which faces are drawn; another number, other faces in another folder."""
SKIN = np.array([[255, 224, 196], [241, 194, 160], [224, 172, 130], [190, 136, 96], [141, 94, 60], [98, 64, 42]], float)
HAIR = np.array([[28, 22, 20], [60, 40, 26], [104, 70, 40], [150, 104, 58], [196, 156, 92], [140, 62, 34]], float)
GREY = np.array([196.0, 196.0, 198.0])
NAMES = ("Åsa Öberg", "Nguyễn Thị Hà", "O'Neil, Tim", 'Ann "Bo" Lee', "José Núñez", "Smith, Jr.", "Łukasz Żak", "佐藤 花子")
"""Made up, with what the real table's names have in them: commas, quotes, letters of every kind."""

Some = Annotated[int, Field(ge=1)]


class SyntheticFacesOptions(FacesOptions):
    """How many faces are drawn, and how they are read."""

    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (48, 40)
    """(Height, width) in pixels that every image is resized to."""
    images: PerImage | None = PerImage(file=Path("attributes.csv"), gender="gender", age="age")
    """Table with a row per image."""
    identities: Path | None = Path("identity_meta.csv")
    """Table with a row per identity; null: none."""
    people: Some = 400
    """Identities in the training split."""
    test_people: Some = 100
    """Identities in the test split."""
    pictures: Some = 12
    """Of each identity."""
    seed: int = Field(0, ge=0)
    """Of everything that is drawn."""


@mtl.register_dataset("synthetic_faces", options=SyntheticFacesOptions, splits=("train", "test"))
def synthetic_faces(split: mtl.Split, root: Path, options: SyntheticFacesOptions) -> mtl.ImageFiles | None:
    """Drawn once into a folder of the data root, `synthetic_faces/`, then read as `vggface2` is; targets as there."""
    return faces(split, folder_of(root, options), options)


def folder_of(root: Path, options: SyntheticFacesOptions) -> Path:
    """Where the faces of these options are; they are drawn if they are not there yet.

    Raises:
        DataError: the folder cannot be written.
    """
    drawn = options.model_dump(include={"people", "test_people", "pictures", "seed"})
    digest = hashlib.sha256(json.dumps([DRAWING, drawn], sort_keys=True).encode()).hexdigest()[:8]
    folder = root / "synthetic_faces" / f"{options.people}+{options.test_people}x{options.pictures}-seed{options.seed}-{digest}"
    if not folder.is_dir():
        count = (options.people + options.test_people) * options.pictures
        print(f"synthetic_faces: drawing {count:,} faces into {folder}, once", file=sys.stderr, flush=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".drawing-") as unfinished:
                write_faces(Path(unfinished) / "faces", options)
                _put(Path(unfinished) / "faces", folder)
        except OSError as error:
            raise mtl.DataError(f"cannot write drawn faces to {str(folder)!r}: {error.strerror or error}") from None
    return folder


def _put(finished: Path, folder: Path) -> None:
    """Another process may have been quicker: then its faces stay, which are the same."""
    try:
        os.rename(finished, folder)
    except OSError:
        if not folder.is_dir():
            raise


def write_faces(folder: Path, options: SyntheticFacesOptions) -> None:
    """Draw a folder: train/, test/, identity_meta.csv, attributes.csv, MAAD_Face.csv, bb_landmark/. The same for the same
    options, NumPy and Pillow.
    """
    random = np.random.default_rng([options.seed, DRAWING])
    meta: list[list[str]] = []
    attributes: list[list[str]] = []
    maad: list[list[str]] = []
    boxes: dict[str, list[list[str]]] = {"train": [], "test": []}
    for number in range(options.people + options.test_people):
        split = "train" if number < options.people else "test"
        person, identity = Person(random), f"n{number + 1:06}"
        (folder / split / identity).mkdir(parents=True)
        for i in range(options.pictures):
            name = f"{identity}/{i + 1:04}_{1 + int(random.random() < 0.1):02}"
            picture, age, box = person.picture(random)
            picture.save(folder / split / f"{name}.jpg", quality=int(random.integers(70, 95)))
            known = random.random() > 0.03
            attributes.append([f"{name}.jpg", GENDERS[person.male], f"{age:.0f}" if known else ""])
            maad.append([f"{name}.jpg", str(number), *_as_maad(person.male, age, random)])
            boxes[split].append([name, *map(str, box)])
        called = f"{NAMES[number % len(NAMES)]} {number + 1}"
        meta.append([identity, called, str(options.pictures), str(int(split == "train")), "fm"[person.male]])
    _write_meta(folder / "identity_meta.csv", meta)
    _write(folder / "attributes.csv", ["path", "gender", "age"], attributes)
    _write(folder / "MAAD_Face.csv", ["Filename", "Identity", "Male", *MAAD_GROUPS], maad)
    (folder / "bb_landmark").mkdir()
    for split, rows in boxes.items():
        _write(folder / "bb_landmark" / BOXES.format(split=split), ["NAME_ID", "X", "Y", "W", "H"], rows)
    (folder / "SYNTHETIC.txt").write_text(
        "Drawn faces of nobody, by mtl_tasks.synthetic_faces. Not photographs, not VGGFace2.\n"
    )


def _as_maad(male: int, age: float, random: np.random.Generator) -> list[str]:
    """MAAD-Face's way of saying it: 1, -1, and 0 where it was not sure."""
    group = int(np.searchsorted([32.0, 52.0], age, side="right"))
    unsure = min(abs(age - 32.0), abs(age - 52.0)) < 3.0 and random.random() < 0.5
    sex = "0" if random.random() < 0.02 else ("1" if male else "-1")
    return [sex, *("0" if unsure else ("1" if i == group else "-1") for i in range(len(MAAD_GROUPS)))]


def _write_meta(file: Path, rows: list[list[str]]) -> None:
    """As it is distributed: a comma and a space between fields, names in quotes."""
    lines = [", ".join(META[:5])]
    for identity, name, *rest in rows:
        lines.append(", ".join([identity, '"{}"'.format(name.replace('"', '""')), *rest]))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write(file: Path, header: list[str], rows: list[list[str]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])


Colour = tuple[int, int, int]
Point = tuple[float, float]


def _colour(rgb: NDArray[Any]) -> Colour:
    red, green, blue = np.clip(np.asarray(rgb, float), 0, 255).round().astype(int).tolist()
    return red, green, blue


class Person:
    """Somebody who does not exist: what stays the same from picture to picture."""

    def __init__(self, random: np.random.Generator) -> None:
        self.male = int(random.random() < 0.5)
        self.age = float(np.clip(random.normal(40, 15), 18, 78))
        tone = random.uniform(0, len(SKIN) - 1)
        self.skin = SKIN[int(tone)] * (1 - tone % 1) + SKIN[math.ceil(tone)] * (tone % 1)
        dark = random.integers(0, 3) if tone > 2.5 else random.integers(0, len(HAIR))
        self.hair = HAIR[dark] + random.normal(0, 6, 3)
        self.iris = np.array([[70, 45, 25], [60, 90, 130], [70, 110, 70]])[random.integers(0, 3)]
        self.wide = random.normal(1.0, 0.05) + 0.03 * self.male
        self.jaw = random.normal(0.70, 0.06) + 0.12 * self.male
        self.brow = random.normal(1.2, 0.3) + 1.0 * self.male
        self.lips = random.normal(2.2, 0.4) - 0.5 * self.male
        self.eyes = random.normal(1.0, 0.08)
        self.nose = random.normal(1.0, 0.12) + 0.08 * self.male
        self.long_hair = random.random() < (0.12 if self.male else 0.78)
        self.fringe = random.random() < (0.10 if self.male else 0.35)
        self.dyed = random.random() < (0.05 if self.male else 0.35)
        self.bearded = bool(self.male) and random.random() < 0.4
        self.recedes = random.uniform(0, 1) * (1.0 if self.male else 0.15)
        self.greys_at = random.normal(52, 8)
        self.glasses = random.random() < 0.15 + 0.003 * max(self.age - 40, 0)

    def picture(self, random: np.random.Generator) -> tuple[Any, float, tuple[int, int, int, int]]:
        """A Pillow image of WIDTH x HEIGHT pixels, the age it shows in years, and the face's left, top, width and height."""
        from PIL import Image, ImageDraw, ImageFilter

        age = float(np.clip(self.age + random.normal(0, 4), 16, 85))
        back = random.uniform(40, 220, 3)
        image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), _colour(back))
        look = _Look(self, age, random)
        look.draw(ImageDraw.Draw(image))
        image = image.rotate(float(random.normal(0, 5)), Image.Resampling.BILINEAR, fillcolor=_colour(back))
        image = image.filter(ImageFilter.GaussianBlur(FINE * float(random.uniform(0.2, 0.6))))
        small = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BOX), float)
        light = np.linspace(-1, 1, WIDTH)[None, :] * random.normal(0, 18) + np.linspace(-1, 1, HEIGHT)[:, None] * random.normal(
            0, 10
        )
        small = (small + light[..., None] + random.normal(0, 5, small.shape)) * random.normal(1.0, 0.08)
        left, top, right, bottom = look.box()
        box = (int(left), int(top), int(right - left), int(bottom - top))
        return Image.fromarray(small.clip(0, 255).astype(np.uint8)), age, box


class _Look:
    """A person in one picture: age, pose, expression, dress; lengths in pixels of the picture."""

    def __init__(self, person: Person, age: float, random: np.random.Generator) -> None:
        self.person, self.age, self.random = person, age, random
        self.x, self.y = WIDTH / 2 + random.normal(0, 2.5), HEIGHT * 0.52 + random.normal(0, 2.5)
        scale = random.normal(1.0, 0.05)
        self.half_width, self.half_height = 19.5 * person.wide * scale, 27.0 * scale
        self.turn = random.normal(0, 2.0)  # features move to a side when a head is turned
        grey = 0.0 if person.dyed else 1 / (1 + math.exp(-(age - person.greys_at) / 5))
        self.hair = person.hair * (1 - grey) + GREY * grey
        faded = min(max(age - 20, 0) / 60, 1)
        self.skin = person.skin * (1 - 0.10 * faded) + np.array([10, 4, 2]) * (1 - faded)
        self.smile = random.normal(1.0, 1.5)
        self.bearded = person.bearded and random.random() < 0.85
        self.hat = random.random() < 0.06

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the face itself."""
        return (
            max(self.x - self.half_width, 0),
            max(self.y - self.half_height, 0),
            min(self.x + self.half_width, WIDTH),
            min(self.y + self.half_height, HEIGHT),
        )

    def at(self, dx: float, dy: float) -> Point:
        """A point of the face: -1 to 1 across and down, in pixels of the drawing."""
        return ((self.x + dx * self.half_width) * FINE, (self.y + dy * self.half_height) * FINE)

    def draw(self, draw: Any) -> None:
        """All of it, from back to front."""
        skin, hair = _colour(self.skin), _colour(self.hair)
        if self.person.long_hair:
            draw.rounded_rectangle([*self.at(-1.25, -0.9), *self.at(1.25, 1.15)], 16 * FINE, fill=hair)
        shirt = _colour(self.random.uniform(20, 230, 3))
        draw.ellipse([*self.at(-1.7, 1.15), *self.at(1.7, 3.0)], fill=shirt)
        draw.rectangle([*self.at(-0.42, 0.6), *self.at(0.42, 1.35)], fill=_colour(self.skin * 0.86))
        draw.ellipse([*self.at(-1.08, -1.15), *self.at(1.08, 0.35)], fill=hair)
        draw.polygon(self._outline(), fill=skin)
        for side in (-1, 1):
            x = side * 1.0
            draw.ellipse([*self.at(x - 0.12, -0.18), *self.at(x + 0.12, 0.18)], fill=_colour(self.skin * 0.93))
        self._hairline(draw, hair)
        self._lines(draw)
        self._features(draw)
        if self.hat:
            colour = _colour(self.random.uniform(20, 200, 3))
            draw.pieslice([*self.at(-1.15, -1.5), *self.at(1.15, 0.1)], 180, 360, fill=colour)
            draw.rectangle([*self.at(-1.3, -0.76), *self.at(1.3, -0.62)], fill=colour)

    def _outline(self) -> list[Point]:
        """Of the face: round above, as wide as the jaw below, cheeks that sink with age."""
        cheeks = 0.03 * (35 - self.age) / 30
        points = []
        for angle in np.linspace(0, 2 * math.pi, 60, endpoint=False):
            dx, dy = math.cos(angle), math.sin(angle)
            if dy > 0:
                dx *= 1 - (1 - self.person.jaw) * dy**1.5 + cheeks * math.sin(math.pi * dy)
            points.append(self.at(dx, dy))
        return points

    def _hairline(self, draw: Any, hair: Colour) -> None:
        """How far hair comes down: less with years for those who lose it, over the forehead with a fringe."""
        lost = self.person.recedes * min(max(self.age - 28, 0) / 30, 1.2)
        if lost > 0.85:
            return  # hair is left at the sides only, and behind
        down = -0.62 - 0.33 * lost if not self.person.fringe else -0.30
        draw.chord([*self.at(-1.02, -1.12), *self.at(1.02, 2 * down + 1.12)], 180, 360, fill=hair)

    def _lines(self, draw: Any) -> None:
        """Wrinkles: across the forehead, beside the nose, under and beside the eyes; more, longer and darker with years."""
        old = (self.age - 26) / 40
        dark = _colour(self.skin * (0.86 - 0.10 * min(max(old, 0), 1)))
        for i in range(min(4, round(4 * old + self.random.normal(0, 0.5)))):
            y, reach = -0.38 - 0.08 * i, 0.45 + 0.1 * self.random.random()
            draw.arc([*self.at(-reach, y - 0.05), *self.at(reach, y + 0.08)], 200, 340, fill=dark, width=FINE - 1)
        for side in (-1, 1):
            if old + self.random.normal(0, 0.12) > 0.25:
                draw.line([self.at(side * 0.24, 0.25), self.at(side * 0.42, 0.52)], fill=dark, width=FINE - 1)
            for i in range(min(3, round(3 * old + self.random.normal(0, 0.4)))):
                draw.line([self.at(side * 0.68, -0.05), self.at(side * 0.84, -0.13 + 0.07 * i)], fill=dark, width=FINE - 2)
            if old > 0.35:
                draw.arc(
                    [*self.at(side * 0.42 - 0.2, -0.05), *self.at(side * 0.42 + 0.2, 0.14)], 20, 160, fill=dark, width=FINE - 1
                )

    def _features(self, draw: Any) -> None:
        """Eyes, brows, nose, mouth, beard, glasses."""
        person, shift = self.person, self.turn / self.half_width
        hair = _colour(self.hair * 0.8)
        beard = _colour(self.hair * 0.9)
        if self.bearded:
            draw.chord([*self.at(-0.82 * person.jaw - 0.1, -0.1), *self.at(0.82 * person.jaw + 0.1, 1.0)], 10, 170, fill=beard)
            draw.rectangle([*self.at(-0.36 + shift, 0.33), *self.at(0.36 + shift, 0.43)], fill=beard)
        for side in (-1, 1):
            x = side * 0.42 * person.eyes + shift
            draw.ellipse([*self.at(x - 0.17, -0.12), *self.at(x + 0.17, 0.05)], fill=(240, 238, 232))
            draw.ellipse([*self.at(x - 0.07, -0.11), *self.at(x + 0.07, 0.03)], fill=_colour(person.iris))
            draw.line([self.at(x - 0.22, -0.24), self.at(x + 0.22, -0.26)], fill=hair, width=max(1, round(person.brow * FINE)))
            if not person.male and self.random.random() < 0.6:
                draw.arc([*self.at(x - 0.19, -0.15), *self.at(x + 0.19, 0.06)], 190, 350, fill=(25, 18, 18), width=FINE - 1)
        tip = 0.30 * person.nose
        draw.line([self.at(shift, -0.05), self.at(1.6 * shift + 0.08, tip)], fill=_colour(self.skin * 0.82), width=FINE - 1)
        draw.arc(
            [*self.at(1.6 * shift - 0.12, tip - 0.08), *self.at(1.6 * shift + 0.12, tip + 0.04)],
            10,
            170,
            fill=_colour(self.skin * 0.78),
            width=FINE - 1,
        )
        painted = not person.male and self.random.random() < 0.5
        lips = np.array([176, 40, 60]) if painted else self.skin * 0.72 + np.array([22, -4, 0])
        bend, thick = 0.05 * self.smile, max(1, round(person.lips * FINE))
        mouth = [self.at(shift + dx, 0.55 + bend * (1 - (dx / 0.3) ** 2)) for dx in np.linspace(-0.3, 0.3, 9)]
        draw.line(mouth, fill=_colour(lips), width=thick, joint="curve")
        if person.glasses:
            for side in (-1, 1):
                x = side * 0.42 * person.eyes + shift
                draw.ellipse([*self.at(x - 0.28, -0.2), *self.at(x + 0.28, 0.15)], outline=(30, 30, 34), width=FINE)
            draw.line([self.at(shift - 0.14, -0.04), self.at(shift + 0.14, -0.04)], fill=(30, 30, 34), width=FINE)
