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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from diffreward.rewards.base import Scores, register_reward
from diffreward.samples import Samples

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


# --------------------------------------------------------------------------------------------
# Judge
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detected:
    """One object found in a picture; pixels of the 64x64 picture, y down."""

    shape: str | None  # None: it resembles no known shape
    colour: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    area: float
    match: float  # intersection over union with the redrawn shape, in [0, 1]

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def fits(self, item: Item) -> bool:
        return self.shape == item.shape and item.colour in (None, self.colour)


MIN_AREA = 16  # px; smaller specks are no objects. The smallest star drawn covers 45.
MIN_MATCH = 0.7  # below this overlap the object has no known shape
BLEED = 0.2  # a colour on less than this share of an object is a stain of its main colour
ASPECT = 1.35  # tolerated stretching of a shape

_NAMES = list(COLOURS)
_INK = 1 - np.array([COLOURS[name] for name in _NAMES], dtype=np.float32) / 255  # white - colour
_TOUCH = np.ones((3, 3), dtype=bool)


def _unmix(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain each pixel of (h, w, 3) as white mixed with one palette colour.

    Returns which colour, (h, w) int, and how much of it, (h, w) in [0, 1]. Edges are thereby
    assigned to their object's colour (a pink edge of a red disc is half red).
    """
    ink = 1 - image
    amount = (ink @ _INK.T / (_INK**2).sum(1)).clip(0, 1)  # (h, w, colours)
    error = np.linalg.norm(ink[..., None, :] - amount[..., None] * _INK, axis=-1)
    colour = error.argmin(-1)
    return colour, np.take_along_axis(amount, colour[..., None], -1)[..., 0]


def _components(colour: np.ndarray, amount: np.ndarray):
    """Yield (colour index, mask) of each object: connected pixels of one colour, without specks."""
    blobs, count = ndimage.label(amount >= 0.5, _TOUCH)
    for blob in range(1, count + 1):
        inside = blobs == blob
        if inside.sum() < MIN_AREA:
            continue
        shares = np.bincount(colour[inside], minlength=len(_NAMES)) / inside.sum()
        main = shares.argmax()
        for c in np.flatnonzero((shares >= BLEED) | (np.arange(len(_NAMES)) == main)):
            own = inside & (colour == c)
            if c == main:  # takes the stains
                own |= inside & (shares[colour] < BLEED)
            parts, n = ndimage.label(own, _TOUCH)
            for part in range(1, n + 1):
                mask = parts == part
                # A sliver one pixel wide is the border between two colours.
                solid = ndimage.binary_erosion(mask, np.ones((2, 2)), border_value=1).any()
                if mask.sum() >= MIN_AREA and solid:
                    yield c, mask


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Where a one-dimensional profile of coverage begins and ends, to a fraction of a pixel."""
    inside = np.flatnonzero(profile >= 0.5)
    first, last = inside[0], inside[-1]
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return float(first - before), float(last + 1 + after)


def _classify(alpha: np.ndarray) -> tuple[str | None, tuple[float, ...], float]:
    """The shape that, redrawn in the object's box, overlaps best with ``alpha`` (h, w)."""
    (x0, x1), (y0, y1) = _extent(alpha.max(0)), _extent(alpha.max(1))
    box, best, match = (x0, y0, x1, y1), None, 0.0
    for shape in SHAPES:
        stretch = (y1 - y0) / (x1 - x0) / _outline(shape)[1]
        if not 1 / ASPECT <= stretch <= ASPECT:
            continue
        drawn = coverage(shape, box, len(alpha))
        overlap = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
        if overlap > match:
            best, match = shape, overlap
    return (best if match >= MIN_MATCH else None), box, match


def detect(images: Float[Tensor, "b 3 h w"]) -> list[list[Detected]]:
    """Find the coloured objects on white of each picture in [0, 1], largest first.

    Pictures of other sizes are first resized to 64x64.
    """
    images = images.detach().float().cpu()
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
    found = []
    for image in images.clamp(0, 1).permute(0, 2, 3, 1).numpy():
        colour, amount = _unmix(image)
        objects = []
        for c, mask in _components(colour, amount):
            alpha = np.where(ndimage.binary_dilation(mask, _TOUCH) & (mask | (amount < 0.5)), 1, 0)
            alpha = (alpha * amount).astype(np.float32)
            shape, box, match = _classify(alpha)
            objects.append(Detected(shape, _NAMES[c], box, float(alpha.sum()), match))
        found.append(sorted(objects, key=lambda o: -o.area))
    return found


def _placed(scene: Scene, objects: Sequence[Detected]) -> bool:
    """Can the scene's items be found among the objects, at places that fulfil its relation?"""
    slots = [item for item in scene.items for _ in range(item.count)]
    first = scene.items[0].count
    for chosen in itertools.permutations(objects[: MAX_OBJECTS + 2], len(slots)):
        if all(o.fits(item) for o, item in zip(chosen, slots, strict=True)):
            if scene.relation is None:
                return True
            centres = np.array([o.centre for o in chosen])
            if related(centres[:first], centres[first:], scene.relation):
                return True
    return False


def judge(scene: Scene, objects: Sequence[Detected]) -> dict[str, float]:
    """How well a scene is fulfilled by the objects of a picture.

    ``exact`` is 1 if the picture shows what was asked and nothing else, otherwise 0. The others
    say what went wrong, in [0, 1]: ``objects`` overlap of the wanted and found shapes, ``colour``
    the same of shapes with their colours, both over the larger of the two numbers of objects;
    ``count`` smaller over larger number of objects; ``position`` 1 if all wanted objects are there
    and lie as asked (always 1 where no relation was asked for).
    """
    slots = [item for item in scene.items for _ in range(item.count)]
    most = max(len(slots), len(objects))
    shapes = Counter(i.shape for i in slots) & Counter(o.shape for o in objects)
    left, coloured = list(objects), 0
    for item in sorted(slots, key=lambda i: i.colour is None):  # the particular ones choose first
        taken = next((o for o in left if o.fits(item)), None)
        if taken:
            left.remove(taken)
            coloured += 1
    placed = _placed(scene, objects)
    return {
        "exact": float(placed and len(objects) == scene.count),
        "objects": sum(shapes.values()) / most,
        "count": min(len(slots), len(objects)) / most,
        "colour": coloured / most,
        "position": float(placed or scene.relation is None),
    }


@register_reward(
    "shapes_checker",
    modality="image",
    differentiable=False,
    needs_prompt=True,
    range=(0.0, 1.0),
    licence="Apache-2.0",
    source="this package; categories after GenEval, arXiv:2310.11513",
)
class ShapesChecker:
    """Exact judge of scenes of simple coloured shapes: 1 if the picture shows just the prompt."""

    def __call__(self, samples: Samples) -> Scores:
        """Scores with ``value`` 1.0 or 0.0, and :func:`judge`'s other numbers as ``parts``.

        Raises:
            ValueError: the samples have no prompts, or one cannot be read.
        """
        if samples.prompts is None:
            raise ValueError("shapes_checker compares pictures with their prompts; there are none")
        scenes = [parse(prompt) for prompt in samples.prompts]
        verdicts = [judge(s, o) for s, o in zip(scenes, detect(samples.data), strict=True)]
        columns = ("exact", "objects", "count", "colour", "position")
        parts = {c: torch.tensor([v[c] for v in verdicts], dtype=torch.float32) for c in columns}
        return Scores(value=parts.pop("exact"), parts=parts)
