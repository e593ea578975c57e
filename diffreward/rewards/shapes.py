"""Scenes of simple coloured shapes: their captions, their renderer and their exact judge.

Three things that belong together, on 64x64 pictures with a white background:

* a *grammar*: ``parse("a red heart above two blue circles")`` gives a :class:`Scene`, and
  ``scene.caption()`` gives the English back;
* a *renderer*: ``render(scene, rng)`` draws it anti-aliased, at random sizes and places which
  fulfil the caption, objects never touching;
* a *judge*: :class:`ShapesChecker` finds the objects in a picture and decides whether the
  prompt is fulfilled exactly (right shapes, counts, colours, positions, and nothing else).

The judge works by synthesis: it redraws each shape with the renderer's own outline at the place
of a detected object and keeps the shape that overlaps best. It needs no weights, so no
reward-trained model can learn to please it without drawing what was asked.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 215, 30),
    "green": (40, 165, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "black": (30, 30, 30),
}
RELATIONS = ("above", "below", "left of", "right of")
CATEGORIES = (
    "single object",
    "two objects",
    "counting",
    "colours",
    "position",
    "colour attribution",
)
MAX_OBJECTS = 4
GRAMMAR = (
    "[a|two|three|four] [colour] shape, optionally followed by 'and', 'above', 'below', 'left of' "
    f"or 'right of' and a second such phrase; shapes: {', '.join(SHAPES)}; colours: "
    f"{', '.join(COLOURS)}; at most {MAX_OBJECTS} objects. Example: 'a red heart above two blue "
    "circles'"
)

# --------------------------------------------------------------------------------------------
# Grammar
# --------------------------------------------------------------------------------------------

_COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
_COUNTS = {"": 1, "a": 1, "an": 1, "one": 1, "1": 1, "2": 2, "3": 3, "4": 4}
_COUNTS |= {word: count for count, word in _COUNT_WORDS.items()}
_OPPOSITE = {"below": "above", "right of": "left of"}
_SYNONYMS = {"over": "above", "on top of": "above", "under": "below", "beneath": "below"}
_SYNONYMS |= {"to the left of": "left of", "to the right of": "right of"}
_LINKS = sorted(("and", *RELATIONS, *_SYNONYMS), key=len, reverse=True)
_ITEM = re.compile(
    rf"(?:({'|'.join(c for c in _COUNTS if c)}) )?(?:({'|'.join(COLOURS)}) )?"
    rf"({'|'.join(SHAPES)})(s?)"
)


@dataclass(frozen=True)
class Item:
    """``count`` objects of one shape; ``colour=None`` means any colour."""

    shape: str
    colour: str | None = None
    count: int = 1

    def phrase(self) -> str:
        noun = self.shape + ("s" if self.count > 1 else "")
        noun = f"{self.colour} {noun}" if self.colour else noun
        article = _COUNT_WORDS[self.count]
        if article == "a" and noun[0] in "aeiou":
            article = "an"
        return f"{article} {noun}"


@dataclass(frozen=True)
class Scene:
    """One or two items; ``relation`` says where the first lies as seen from the second."""

    items: tuple[Item, ...]
    relation: str | None = None

    @property
    def count(self) -> int:
        return sum(item.count for item in self.items)

    def caption(self) -> str:
        """The English caption, which :func:`parse` reads back to an equal scene."""
        return f" {self.relation or 'and'} ".join(item.phrase() for item in self.items)

    def canonical(self) -> Scene:
        """One scene for all wordings: 'b below a' is 'a above b', 'b and a' is 'a and b'."""
        if self.relation in _OPPOSITE:
            return Scene(self.items[::-1], _OPPOSITE[self.relation])
        if self.relation is None:
            return Scene(tuple(sorted(self.items, key=Item.phrase)))
        return self

    def held_out(self) -> bool:
        """True for the eighth of the composed scenes that no embedded model was trained on.

        Decided by a hash of the canonical caption, so that every wording of a scene falls on the
        same side. Single objects are never held out: there are only 42 of them.
        """
        return self.count > 1 and zlib.crc32(self.canonical().caption().encode()) % 8 == 0


def parse(prompt: str) -> Scene:
    """Read a prompt. Raises ValueError, naming the grammar, when it is not understood."""
    text = re.sub(r"\s+", " ", prompt.lower().replace("color ", "")).strip(" .!")
    for link in _LINKS:
        left, found, right = text.partition(f" {link} ")
        if found:
            phrases, relation = (left, right), _SYNONYMS.get(link, link)
            break
    else:
        phrases, relation = (text,), "and"
    items = []
    for phrase in phrases:
        match = _ITEM.fullmatch(phrase)
        if match is None:
            raise ValueError(f"cannot read {phrase!r} in prompt {prompt!r}. Understood: {GRAMMAR}")
        count, colour, shape, plural = match.groups()
        if plural and _COUNTS[count or ""] == 1:
            raise ValueError(f"{phrase!r} in prompt {prompt!r} is a plural without a number")
        items.append(Item(shape, colour, _COUNTS[count or ""]))
    scene = Scene(tuple(items), None if relation == "and" else relation)
    if scene.count > MAX_OBJECTS:
        raise ValueError(f"prompt {prompt!r} asks for {scene.count} objects, at most {MAX_OBJECTS}")
    return scene


def random_scene(rng: np.random.Generator, category: str | None = None) -> Scene:
    """Draw a scene of one of :data:`CATEGORIES`, or without ``category`` a mixture of all forms.

    single object: one shape of one colour. two objects: two shapes of the same colour.
    counting: two to four equal shapes, or two groups. colours: one shape in two colours.
    position: two objects (sometimes groups) and a relation. colour attribution: two objects
    that differ in shape and colour. The mixture also leaves colours unnamed now and then.
    """

    def pick(options, n=1):
        return [options[i] for i in rng.permutation(len(options))[:n]]

    mixture = category is None
    if mixture:
        category = CATEGORIES[rng.choice(6, p=[0.2, 0.1, 0.2, 0.1, 0.22, 0.18])]
    (s1, s2), (c1, c2) = pick(SHAPES, 2), pick(list(COLOURS), 2)
    counts, relation = (1, 1), None
    if category == "single object":
        items = (Item(s1, c1),)
    elif category == "two objects":
        items = (Item(s1, c1), Item(s2, c1))
    elif category == "counting":
        if rng.random() < 0.75:
            items = (Item(s1, c1, int(rng.integers(2, MAX_OBJECTS + 1))),)
        else:
            counts = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)][rng.integers(5)]
            items = (Item(s1, c1, counts[0]), Item(s2, c2, counts[1]))
    elif category == "colours":
        items = (Item(s1, c1), Item(s1, c2))
    elif category == "position":
        if mixture and rng.random() < 0.25:
            counts = [(1, 2), (2, 1)][rng.integers(2)]
        if rng.random() < 0.15:
            s2 = s1
        elif rng.random() < 0.15:
            c2 = c1
        items = (Item(s1, c1, counts[0]), Item(s2, c2, counts[1]))
        relation = RELATIONS[rng.integers(4)]
    elif category == "colour attribution":
        items = (Item(s1, c1), Item(s2, c2))
    else:
        raise ValueError(f"unknown category {category!r}; one of {', '.join(CATEGORIES)}")
    if mixture and rng.random() < 0.08 and len({item.shape for item in items}) == len(items):
        items = tuple(Item(item.shape, None, item.count) for item in items)
    return Scene(items, relation)


# --------------------------------------------------------------------------------------------
# Renderer
# --------------------------------------------------------------------------------------------


@lru_cache
def _outline(shape: str) -> tuple[np.ndarray, float]:
    """The polygon of a shape in its own box [0, 1]^2, y down, and the box's height / width."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    if shape in ("circle", "ring"):
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "square":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1.0]])
    elif shape == "triangle":
        points = np.array([[0, -1], [1, 0.8], [-1, 0.8]])
    elif shape == "star":
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.45, 1.0)
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)
    elif shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([x, -y], 1)
    else:
        raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    low, high = points.min(0), points.max(0)
    return (points - low) / (high - low), float((high - low)[1] / (high - low)[0])


RING_HOLE = 0.55  # inner / outer diameter
_SUPER = 4  # supersampling per axis


def coverage(shape: str, box: tuple[float, float, float, float], size: int = SIZE) -> np.ndarray:
    """How much of each pixel the shape covers, (size, size) float32 in [0, 1].

    ``box`` is (x0, y0, x1, y1) in pixels; the outline is stretched to fill it.
    """
    canvas = Image.new("L", (size * _SUPER, size * _SUPER), 0)
    draw = ImageDraw.Draw(canvas)
    low, high = np.array(box[:2]) * _SUPER, np.array(box[2:]) * _SUPER
    points, _ = _outline(shape)
    # PIL's pixel centres lie on integers and its polygons include their border: hence the 1.
    draw.polygon([tuple(p) for p in low + points * (high - low - 1)], fill=255)
    if shape == "ring":
        inner = 0.5 + (points - 0.5) * RING_HOLE
        draw.polygon([tuple(p) for p in low + inner * (high - low - 1)], fill=0)
    return np.asarray(canvas.reduce(_SUPER), dtype=np.float32) / 255


_DIAMETER = {1: (24, 42), 2: (19, 27), 3: (16, 21), 4: (15, 19)}  # by number of objects, px
_MARGIN, _GAP = 2.5, 3.0  # px to the border, px between objects


def related(first: np.ndarray, second: np.ndarray, relation: str) -> bool:
    """Do the centres ``first`` (n, 2) lie above / below / left of / right of ``second`` (m, 2)?

    Every one of the first must lie on the right side of every one of the second, and the offset
    between the two groups' means must point in that direction more than sideways.
    """
    relation, swap = _OPPOSITE.get(relation, relation), relation in _OPPOSITE
    if swap:
        first, second = second, first
    axis = 1 if relation == "above" else 0
    offset = second.mean(0) - first.mean(0)
    return bool(
        first[:, axis].max() < second[:, axis].min() and offset[axis] > abs(offset[1 - axis])
    )


def _layout(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float, float]]:
    """Boxes of the scene's objects, in the order of its items. Tries until one fits."""
    shapes = [item.shape for item in scene.items for _ in range(item.count)]
    low, high = _DIAMETER[scene.count]
    for attempt in itertools.count():
        shrink = max(0.75, 1 - attempt / 2000)  # crowded scenes get smaller objects
        width = rng.uniform(low, high) * rng.uniform(0.92, 1.08, len(shapes)) * shrink
        height = width * np.array([_outline(s)[1] for s in shapes])
        size = np.stack([width, height], 1)
        corner = rng.uniform(_MARGIN, SIZE - _MARGIN - size)
        boxes = np.concatenate([corner, corner + size], 1)
        apart = all(
            max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= _GAP
            for a, b in itertools.combinations(boxes, 2)
        )
        if not apart:
            continue
        centre = corner + size / 2
        n = scene.items[0].count
        if scene.relation:
            first, second = centre[:n], centre[n:]
            # A clear case: 20 degrees away from the diagonal, where the judge's answer flips.
            axis = 1 if scene.relation in ("above", "below") else 0
            offset = np.abs(second.mean(0) - first.mean(0))
            if not related(first, second, scene.relation) or offset[axis] < 2 * offset[1 - axis]:
                continue
        return [tuple(box) for box in boxes]


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: (64, 64, 3) uint8 RGB on white."""
    image = np.full((SIZE, SIZE, 3), 255.0, dtype=np.float32)
    boxes = iter(_layout(scene, rng))
    for item in scene.items:
        colour = item.colour or list(COLOURS)[rng.integers(len(COLOURS))]
        paint = np.array(COLOURS[colour]) + rng.uniform(-8, 8, 3)
        for _ in range(item.count):
            alpha = coverage(item.shape, next(boxes))[..., None]
            image = image * (1 - alpha) + alpha * paint
    return image.clip(0, 255).round().astype(np.uint8)
