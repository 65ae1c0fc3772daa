"""Drawings of people: an identity, a camera and a moment make an image, visible, near-infrared or thermal.

An identity has lasting traits (build, hair, garments, bag, shoes). A camera has a viewpoint, backgrounds,
light, blur and noise. A moment has a pose, a shift, its light and perhaps an occlusion. Every surface has a
visible colour, a near-infrared reflectance and a warmth. For plain cloth they are drawn independently, so
colour helps within the visible modality and misleads across modalities, while shape, cut, pattern and
material are the same in both. Of a pattern's two inks, the same one is lighter in visible light and in near
infrared.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

SUPERSAMPLE = 2  # drawn pixels per image pixel and axis
# The second number in each generator's seed, so that no two kinds of draws share random numbers.
SPLIT, IDENTITY, CAMERA, BACKGROUND, MOMENT = range(5)

Point = tuple[float, float, float]  # lateral, up, forward, in body heights from the point between the feet


# ---------------------------------------------------------------------------- identities and cameras


@dataclass(frozen=True)
class Ink:
    """A surface in each spectrum, in [0, 1]: red, green, blue; near-infrared reflectance; warmth."""

    visible: tuple[float, float, float]
    infrared: float
    thermal: float


@dataclass(frozen=True)
class Cloth:
    """A surface with a pattern of two inks; period in body heights; gloss and quilt are of the material."""

    ink: Ink
    accent: Ink
    pattern: str = "plain"
    period: float = 0.1
    gloss: float = 0.0
    quilt: bool = False


@dataclass(frozen=True)
class Identity:
    """The lasting traits of a person; lengths are in heights of an average person."""

    height: float
    girth: float
    shoulders: float
    skin: Cloth
    hair: Cloth
    hair_style: str
    hat: Cloth
    hat_style: str
    top: Cloth
    sleeves: str
    hem: float
    opening: float  # half angle, in radians, at which an open garment shows the shirt below; 0: closed
    inner: Cloth
    bottom: Cloth
    bottom_cut: str
    shoes: Cloth
    boots: bool
    bag: Cloth
    bag_style: str


@dataclass(frozen=True)
class Camera:
    """What all images of a camera share; spectrum is "visible", "infrared" or "thermal"."""

    spectrum: str
    key: tuple[int, ...]  # seed of its backgrounds
    facing: float
    elevation: float
    light: float
    brightness: float
    contrast: float
    saturation: float
    cast: tuple[float, ...]  # a gain for each channel
    blur: float
    noise: float


PALETTE = [
    *[(0.10, 0.10, 0.11), (0.92, 0.92, 0.90), (0.50, 0.51, 0.53), (0.11, 0.15, 0.36), (0.16, 0.36, 0.72)],
    *[(0.52, 0.74, 0.92), (0.78, 0.12, 0.14), (0.44, 0.08, 0.16), (0.13, 0.46, 0.24), (0.40, 0.42, 0.20)],
    *[(0.94, 0.80, 0.22), (0.92, 0.48, 0.14), (0.94, 0.62, 0.72), (0.46, 0.24, 0.56), (0.82, 0.73, 0.56)],
    *[(0.42, 0.28, 0.17), (0.20, 0.62, 0.62)],
]
SKIN = [(0.96, 0.80, 0.70), (0.90, 0.70, 0.56), (0.78, 0.57, 0.43), (0.58, 0.40, 0.29), (0.38, 0.25, 0.18)]
HAIR = [(0.08, 0.07, 0.07), (0.20, 0.13, 0.09), (0.42, 0.27, 0.15), (0.80, 0.64, 0.36), (0.62, 0.60, 0.58)]


def _pick(rng: np.random.Generator, **weights: float) -> str:
    names, values = list(weights), np.array(list(weights.values()), float)
    return names[rng.choice(len(names), p=values / values.sum())]


def _colour(rng: np.random.Generator, palette: list) -> tuple[float, float, float]:
    return tuple(np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.03, 3), 0, 1).tolist())


def _cloth(
    rng: np.random.Generator, pattern: str = "plain", warmth: tuple[float, float] = (0.3, 0.75)
) -> Cloth:
    """A random surface of a garment, with gloss, quilting and the two inks of a pattern."""
    lighter = rng.choice([-1, 1])  # which ink is lighter: the accent (1) or the other (-1)
    ink, accent = _colour(rng, PALETTE), _colour(rng, PALETTE)
    while lighter * (np.mean(accent) - np.mean(ink)) < 0.25:  # so that a grey picture shows the pattern too
        ink, accent = _colour(rng, PALETTE), _colour(rng, PALETTE)
    infrared = rng.uniform(0.12, 0.38) if lighter > 0 else rng.uniform(0.6, 0.9)
    if pattern == "plain":
        ink, infrared = _colour(rng, PALETTE), rng.uniform(0.3, 0.7)
    infrared_accent = float(np.clip(infrared + lighter * rng.uniform(0.4, 0.55), 0.05, 0.95))
    warm = rng.uniform(*warmth)
    gloss, quilt = rng.choice([0, 0, 0.3, 0.5]), rng.random() < 0.15 and pattern == "plain"
    return Cloth(
        Ink(ink, infrared, warm),
        Ink(accent, infrared_accent, warm + rng.choice([-0.12, 0.12])),
        pattern,
        period=rng.choice([0.105, 0.14, 0.18]),
        gloss=float(gloss),
        quilt=bool(quilt),
    )


def _plain(colour: tuple[float, float, float], infrared: float, thermal: float, gloss: float = 0.0) -> Cloth:
    ink = Ink(colour, infrared, thermal)
    return Cloth(ink, ink, gloss=gloss)


def make_identity(seed: int, pid: int) -> Identity:
    """Return the lasting traits of person pid; they depend only on (seed, pid)."""
    rng = np.random.default_rng([seed, IDENTITY, pid])
    top = _pick(rng, vest=1.5, shirt=2, longsleeve=2, jacket=2, coat=2)
    pattern = _pick(
        rng, plain=0.6, hoops=2, stripes=1.5, checks=1.5, dots=1.5, print=1.5, yoke=1.5, band=1.5, raglan=1.5
    )
    bottom_cut = _pick(rng, slim=1.5, straight=1.5, wide=2, shorts=2, skirt=2, longskirt=1.5)
    return Identity(
        height=rng.uniform(0.84, 1.06),
        girth=rng.choice([0.8, 1.0, 1.26]) + rng.uniform(-0.04, 0.04),
        shoulders=rng.uniform(0.92, 1.1),
        skin=_plain(_colour(rng, SKIN), rng.uniform(0.68, 0.8), rng.uniform(0.88, 0.98)),
        hair=_plain(_colour(rng, HAIR), rng.uniform(0.12, 0.5), 0.6, gloss=0.2),
        hair_style=_pick(rng, bald=1, short=3, bob=2, long=3, ponytail=2, bun=1.5, afro=1.5),
        hat=_cloth(rng, warmth=(0.35, 0.55)),
        hat_style=_pick(rng, none=3, cap=1.2, beanie=1.2, brimmed=1.2),
        top=_cloth(rng, pattern),
        sleeves={"vest": "none", "shirt": "short"}.get(top, "long"),
        hem={"jacket": 0.47, "coat": rng.uniform(0.24, 0.34)}.get(top, rng.choice([0.455, 0.53])),
        opening=float(top in ("jacket", "coat")) * rng.choice([0.0, 0.3, 0.55]),
        inner=_cloth(rng),
        bottom=_cloth(rng, _pick(rng, plain=1.5, stripes=1.5, checks=1.5, side=2, dots=1.5)),
        bottom_cut=bottom_cut,
        shoes=_cloth(rng, warmth=(0.25, 0.45)),
        boots=bool(rng.random() < 0.25),
        bag=_cloth(rng, _pick(rng, plain=3, yoke=1), warmth=(0.1, 0.3)),
        bag_style=_pick(rng, none=2, backpack=2, messenger=2, handbag=1.5, tote=1.5),
    )


def make_camera(seed: int, modality: str, camid: int, thermal: bool = False) -> Camera:
    """Return what a camera's images share.

    Args:
        seed: of the dataset.
        modality: "visible" or "infrared".
        camid: number of the camera.
        thermal: infrared images show warmth, as RegDB's do.
    """
    key = (seed, BACKGROUND, ("visible", "infrared").index(modality), camid)
    rng = np.random.default_rng([seed, CAMERA, *key[2:]])
    visible = modality == "visible"
    return Camera(
        spectrum="thermal" if thermal and not visible else modality,
        key=key,
        facing=rng.uniform(-0.5, 0.5),  # people come towards the camera
        elevation=rng.uniform(0.05, 0.25),
        light=rng.uniform(-1.0, 1.0) * visible,  # an infrared camera's illuminator is next to its lens
        brightness=rng.uniform(0.7, 1.15) if visible else rng.uniform(0.8, 1.1),
        contrast=rng.uniform(0.75, 1.1),
        saturation=rng.uniform(0.1, 0.5),
        cast=tuple(rng.uniform(0.8, 1.15, 3).tolist()) if visible else (1.0,),
        blur=rng.uniform(0.2, 0.5) if visible else rng.uniform(0.3, 0.6),
        noise=rng.uniform(0.003, 0.01) if visible else rng.uniform(0.006, 0.016),
    )


# ---------------------------------------------------------------------------- drawing


def _pattern(cloth: Cloth, around: np.ndarray, along: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Share of the accent ink, in [0, 1], at arc length `around` and `along`, both in body heights."""
    period = cloth.period
    a, b = around % period, along % period
    if cloth.pattern == "hoops":
        return b < period / 2
    if cloth.pattern == "stripes":
        return a < period / 2
    if cloth.pattern == "checks":
        return ((a < period / 2) * 0.5 + (b < period / 2) * 0.5) ** 1.3
    if cloth.pattern == "dots":
        return np.hypot(a - period / 2, b - period / 2) < 0.33 * period
    if cloth.pattern == "print":  # on the chest and on the back, visible from both sides
        front = np.abs((azimuth + math.pi / 2) % math.pi - math.pi / 2)
        return np.hypot(front / 0.75, (along - 0.17) / 0.065) < 1
    if cloth.pattern == "yoke":
        return along < 0.13
    if cloth.pattern == "band":
        return (along > 0.12) & (along < 0.2)
    if cloth.pattern == "side":
        return np.abs(np.sin(azimuth)) > 0.8
    return np.zeros_like(around)


class Canvas:
    """An image being drawn, in one spectrum: pixels (height, width, 3 or 1) float32 in [0, 1]."""

    def __init__(self, height: int, width: int, camera: Camera):
        self.camera = camera
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.pixels = np.zeros((height, width, 3 if camera.spectrum == "visible" else 1), np.float32)

    def ink(self, ink: Ink) -> np.ndarray:
        """What the canvas's camera sees of ink: (channels,) float32."""
        return np.atleast_1d(np.float32(getattr(ink, self.camera.spectrum)))

    def blend(self, where: tuple, alpha: np.ndarray, colour: np.ndarray) -> None:
        """Mix colour into the pixels at where, with the share alpha in [0, 1]."""
        self.pixels[where] += alpha[..., None] * (colour - self.pixels[where])

    def tube(
        self, start, end, radii, cloth: Cloth, unit: float, turn=0.0, cap=False, inner=None, opening=0.0
    ):
        """Draw a round body between two points: limbs, torsos, skirts, heads and bags are all tubes.

        Args:
            start, end: (x, y) in pixels.
            radii: the outline, in pixels, at equal distances along the axis.
            cloth: the surface.
            unit: pixels per body height.
            turn: angle, in radians, by which the front is turned away from the camera.
            cap: round the ends.
            inner, opening: within this half angle around the front, in radians, the cloth inner shows.
        """
        radii = np.asarray(radii, np.float32)
        (x0, y0), (x1, y1) = start, end
        margin = radii.max() + 2
        rows = slice(max(0, int(min(y0, y1) - margin)), max(0, int(max(y0, y1) + margin)))
        columns = slice(max(0, int(min(x0, x1) - margin)), max(0, int(max(x0, x1) + margin)))
        x, y = self.x[rows, columns] - x0, self.y[rows, columns] - y0
        if not x.size:
            return
        length = max(math.hypot(x1 - x0, y1 - y0), 1e-3)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        along, across = x * dx + y * dy, x * dy - y * dx
        inside = np.clip(along, 0, length)
        radius = np.interp(inside, np.linspace(0, length, len(radii)), radii).astype(np.float32)
        if cap:
            distance = np.hypot(across, along - inside) - radius
        else:
            distance = np.maximum(np.abs(across) - radius, np.abs(along - length / 2) - length / 2)
        alpha = np.clip(0.5 - distance, 0, 1)

        angle = np.arcsin(np.clip(across / np.maximum(radius, 1e-3), -1, 1))
        azimuth = (angle - turn + math.pi) % (2 * math.pi) - math.pi
        around = azimuth * radius.mean() / unit
        mix = np.asarray(_pattern(cloth, around, along / unit, azimuth), np.float32)[..., None]
        colour = self.ink(cloth.ink) * (1 - mix) + self.ink(cloth.accent) * mix
        if opening:
            colour = np.where(np.abs(azimuth)[..., None] < opening, self.ink(inner.ink), colour)
        self.blend((rows, columns), alpha, colour * self._shade(cloth, angle, along / unit)[..., None])

    def _shade(self, cloth: Cloth, angle: np.ndarray, along: np.ndarray) -> np.ndarray:
        """Light on a round surface: from the side, in infrared from the camera, almost none in thermal."""
        if self.camera.spectrum == "thermal":
            return 0.9 + 0.1 * np.cos(angle)
        toward = np.cos(angle - self.camera.light)
        shade = 0.58 + 0.42 * np.maximum(toward, 0) + cloth.gloss * np.maximum(toward, 0) ** 12
        shade *= 1 + 0.05 * np.sin(47 * along + 3 * angle)  # folds
        if cloth.quilt:
            shade *= 0.72 + 0.28 * np.abs(np.sin(math.pi * along / 0.07))
        return shade

    def soft_noise(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth random texture (height, width) in about [-1, 1], with `cells` cells across the width."""
        height, width = self.x.shape
        grid = rng.normal(0, 0.5, (max(2, cells * height // width), cells)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _draw_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Fill the canvas with one of its camera's three backgrounds, at a random offset and zoom."""
    place = np.random.default_rng([*canvas.camera.key, int(rng.integers(3))])
    height = canvas.x.shape[0]
    zoom = rng.uniform(0.75, 1.2)
    x, y = canvas.x / height * zoom + rng.uniform(0, 10), canvas.y / height + rng.uniform(-0.06, 0.06)
    horizon = place.uniform(0.55, 0.8)
    surfaces = []
    for _ in range(5):
        grey, infrared, warmth = place.uniform(0.25, 0.85), place.uniform(0.1, 0.75), place.uniform(0.08, 0.4)
        surfaces.append(Ink(tuple(0.65 * grey + 0.35 * np.array(_colour(place, PALETTE))), infrared, warmth))
    wall, detail, item, frame, floor = surfaces
    texture = _pick(place, plain=2, bricks=1, tiles=1, panels=1, foliage=0.8)
    if texture == "foliage":  # leaves are dark by day and bright in near infrared
        wall, detail = Ink((0.20, 0.33, 0.14), 0.75, 0.25), Ink((0.36, 0.50, 0.22), 0.9, 0.3)
    everywhere = (slice(None), slice(None))

    canvas.pixels[:] = canvas.ink(wall)
    if texture == "bricks":
        row = np.floor(y / 0.045)
        line = (y % 0.045 < 0.008) | ((x + 0.05 * (row % 2)) % 0.1 < 0.008)
    elif texture == "tiles":
        line = (y % 0.11 < 0.008) | (x % 0.11 < 0.008)
    elif texture == "panels":
        line = x % 0.16 < 0.012
    elif texture == "foliage":
        line = np.clip(canvas.soft_noise(rng, 14) * 1.5 + 0.4, 0, 1)
    else:
        line = (y > horizon - 0.035) * 1.0  # a skirting board
    canvas.blend(everywhere, np.float32(line), canvas.ink(detail))

    period = place.uniform(0.45, 0.9)
    beside = np.abs(x % period - period / 2)
    things = (
        {"trunks": 1.0} if texture == "foliage" else {"doors": 2, "windows": 2, "posters": 1, "shelves": 1}
    )
    kind = _pick(place, nothing=1, pillars=1, **things)
    if kind == "doors":
        outline, core = (beside < 0.13) & (y > horizon - 0.55), (beside < 0.11) & (y > horizon - 0.53)
        core &= np.hypot(beside - 0.09, y - horizon + 0.25) > 0.012
    elif kind == "windows":
        outline, core = (
            (beside < 0.15) & (np.abs(y - 0.26) < 0.15),
            (beside < 0.135) & (np.abs(y - 0.26) < 0.135),
        )
        core &= (beside > 0.01) & (np.abs(y - 0.24) > 0.01)
    elif kind == "posters":
        outline, core = (
            (beside < 0.10) & (np.abs(y - 0.3) < 0.12),
            (beside < 0.08) & (np.abs(y - 0.26) < 0.06),
        )
    elif kind == "shelves":
        outline = (y % 0.14 < 0.12) & (beside < 0.2)
        core = outline & (np.sin(np.floor(x / 0.035) * 12.9 + np.floor(y / 0.14) * 78.2) > -0.1)
    elif kind in ("pillars", "trunks"):
        outline, core = beside < 0.06, beside < 0.04
    else:
        outline = core = np.zeros(x.shape, bool)
    canvas.blend(everywhere, np.float32(outline), canvas.ink(frame))
    canvas.blend(everywhere, np.float32(core), canvas.ink(item))

    ground = np.clip((y - horizon) * height, 0, 1)
    depth = 1 / np.maximum(y - horizon + 0.12, 0.02)
    sideways = (canvas.x / height - 0.2) * depth + rng.uniform(0, 10)
    joints = {"slabs": (sideways % 0.9 < 0.05) | (depth % 0.7 < 0.06), "planks": sideways % 0.4 < 0.04}
    paving = joints.get(_pick(place, plain=1, slabs=1, planks=1), np.zeros(x.shape, bool))
    canvas.blend(everywhere, ground, canvas.ink(floor) * (1 - 0.25 * paving[..., None]))
    canvas.pixels *= (1 + 0.10 * canvas.soft_noise(rng, 5) + 0.04 * canvas.soft_noise(rng, 40))[..., None]
    tone = canvas.pixels.mean((0, 1))
    canvas.pixels[:] = tone + 0.6 * (canvas.pixels - tone)  # less contrast than the person in front
    if canvas.camera.spectrum == "infrared":  # the background is far from the illuminator
        canvas.pixels *= rng.uniform(0.45, 0.9)


class _Figure:
    """Projects points of the body and collects its tubes, then draws them from far to near."""

    def __init__(self, canvas: Canvas, facing: float, foot: tuple[float, float], unit: float):
        self.canvas, self.facing, self.foot, self.unit = canvas, facing, foot, unit
        self.parts: list[tuple[float, Callable]] = []

    def project(self, point: Point) -> tuple[tuple[float, float], float, float]:
        """Pixel position, pixels per body height there, and depth toward the camera."""
        lateral, up, forward = point
        cos, sin, tilt = math.cos(self.facing), math.sin(self.facing), self.canvas.camera.elevation
        near = forward * cos - lateral * sin
        scale = self.unit * (1 + tilt * (up - 0.5))  # seen from above, the head is nearer than the feet
        drop = up + 0.5 * tilt * up * (up - 1) - 0.5 * tilt * near
        x = self.foot[0] + scale * (lateral * cos + forward * sin)
        return (x, self.foot[1] - self.unit * drop), scale, near

    def around(self, wide: float, deep: float) -> float:
        """Half the width of an elliptic cross-section as the camera sees it."""
        return math.hypot(wide * math.cos(self.facing), deep * math.sin(self.facing))

    def add(self, start: Point, end: Point, radii, cloth: Cloth, layer: float = 0.0, **style) -> None:
        """Collect a tube; radii are in body heights; layer is added to its depth."""
        a, scale_a, near_a = self.project(start)
        b, scale_b, near_b = self.project(end)
        radii = np.asarray(radii) * np.linspace(scale_a, scale_b, len(radii))
        draw = partial(self.canvas.tube, a, b, radii, cloth, self.unit, turn=self.facing, **style)
        self.parts.append((0.5 * (near_a + near_b) + layer, draw))

    def draw(self) -> None:
        for _, draw in sorted(self.parts, key=lambda part: part[0]):
            draw()


def _limb(root: Point, swing: float, bend: float, lengths: tuple[float, float], spread: float) -> list[Point]:
    """Root, joint and end of an arm or a leg, swung forward by swing radians, its lower half by bend more."""
    points = [root]
    for length, angle in zip(lengths, (swing, swing + bend), strict=True):
        lateral, up, forward = points[-1]
        points.append(
            (lateral + spread * length, up - length * math.cos(angle), forward + length * math.sin(angle))
        )
    return points


def _between(a: Point, b: Point, share: float) -> Point:
    return tuple((1 - share) * p + share * q for p, q in zip(a, b, strict=True))


def _add_legs(figure: _Figure, who: Identity, stride: float) -> None:
    g = who.girth
    thin = [0.05 * g, 0.034 * g, 0.022]
    cloth = {"slim": [0.055 * g, 0.042 * g, 0.032], "straight": [0.058 * g, 0.052 * g, 0.046]}
    cloth |= {"wide": [0.062 * g, 0.068 * g, 0.078], "shorts": [0.062 * g, 0.066 * g]}
    for side in (-1, 1):
        swing = side * stride
        hip, knee, ankle = _limb(
            (side * 0.048 * g, 0.5, 0), swing, -0.5 * abs(stride), (0.235, 0.235), side * 0.04
        )
        toe = (ankle[0], ankle[1] - 0.008, ankle[2] + 0.075)
        figure.add(hip, knee, thin[:2], who.skin, -2, cap=True)
        figure.add(knee, ankle, thin[1:], who.skin, -2, cap=True)
        figure.add(ankle, toe, [0.027, 0.022], who.shoes, -1.9, cap=True)
        if who.bottom_cut == "shorts":
            figure.add(hip, _between(hip, knee, 0.85), cloth["shorts"], who.bottom, -1.8)
        elif who.bottom_cut in cloth:
            radii = cloth[who.bottom_cut]
            figure.add(hip, knee, radii[:2], who.bottom, -1.8, cap=True)
            figure.add(knee, _between(knee, ankle, 0.95), radii[1:], who.bottom, -1.8)
        if who.boots:
            radius = max(0.04, cloth["slim"][1] + 0.004)
            figure.add(_between(knee, ankle, 0.3), ankle, [radius, 0.036], who.shoes, -1.7)
    wide = 0.105 * g
    figure.add(
        (0, 0.58, 0),
        (0, 0.465, 0),
        figure.around(wide, 0.075 * g) * np.array([0.85, 1, 0.8]),
        who.bottom,
        -1.6,
    )
    if who.bottom_cut in ("skirt", "longskirt"):
        hem, flare = (0.3, 1.45) if who.bottom_cut == "skirt" else (0.1, 1.6)
        flare += abs(stride) * 0.3
        radii = figure.around(wide, 0.08 * g) * np.linspace(0.8, flare, 4) ** 0.9
        figure.add((0, 0.6, 0), (0, hem, 0), radii, who.bottom, -1.5)


def _add_torso(figure: _Figure, who: Identity) -> None:
    g = who.girth
    ups = np.linspace(0.85, who.hem, 12)
    heights = [0.24, 0.46, 0.53, 0.62, 0.74, 0.8, 0.825, 0.85]
    chest = 0.108 * who.shoulders * g
    widths = [0.15 * g, 0.112 * g, 0.104 * g, 0.088 * g, 0.098 * g, chest, chest * 0.85, 0.045]
    radii = [figure.around(w, 0.7 * w) for w in np.interp(ups, heights, widths)]
    loose = 1.12 if who.hem < 0.5 and who.sleeves == "long" else 1.0
    figure.add((0, 0.9, 0.005), (0, 0.82, 0), [0.03, 0.034], who.skin, -1.2)
    pattern = "plain" if who.top.pattern == "raglan" else who.top.pattern
    top = replace(who.top, pattern=pattern)
    figure.add(
        (0, 0.85, 0), (0, who.hem, 0), np.array(radii) * loose, top, inner=who.inner, opening=who.opening
    )


def _add_arms(figure: _Figure, who: Identity, swing: float, bends: np.ndarray) -> Point:
    """Collect both arms; return where the right hand is."""
    g = who.girth**0.7
    sleeve = replace(who.top, pattern="plain") if who.top.pattern in ("print", "band") else who.top
    if who.top.pattern == "raglan":
        sleeve = replace(who.top, ink=who.top.accent, pattern="plain")
    radii = np.array([0.036, 0.032, 0.029]) * g
    for side, bend in zip((-1, 1), bends, strict=True):
        root = (side * 0.104 * who.shoulders * who.girth, 0.805, 0)
        shoulder, elbow, hand = _limb(root, -side * swing, bend, (0.17, 0.16), side * 0.14)
        layer = 0.02 * math.copysign(1, -side * math.sin(figure.facing))
        if who.sleeves != "long":
            figure.add(shoulder, elbow, [0.03 * g, 0.025 * g], who.skin, layer, cap=True)
            figure.add(elbow, hand, [0.025 * g, 0.018 * g], who.skin, layer, cap=True)
        figure.add(hand, _between(elbow, hand, 1.12), [0.022, 0.02], who.skin, layer, cap=True)
        if who.sleeves != "none":
            end = elbow if who.sleeves == "long" else _between(shoulder, elbow, 0.62)
            figure.add(shoulder, _between(shoulder, end, 0.3), radii[[0, 0]], sleeve, layer + 0.001, cap=True)
            figure.add(shoulder, end, radii[:2], sleeve, layer + 0.001, cap=end == elbow)
        if who.sleeves == "long":
            figure.add(elbow, hand, radii[1:], sleeve, layer + 0.002, cap=True)
    return hand


def _add_head(figure: _Figure, who: Identity) -> None:
    cos, sin = math.cos(figure.facing), math.sin(figure.facing)
    bald = who.hair_style == "bald"
    hair = who.skin if bald else who.hair
    size = 1.55 if who.hair_style == "afro" and who.hat_style == "none" else 1.0 if bald else 1.12
    high, low = 0.945, 0.915
    figure.add((0, high, -0.006), (0, low, -0.006), [0.048 * size, 0.046 * size], hair, 0.3, cap=True)
    if cos > -0.4:  # the face turns away with the head
        wide = 0.029 + (0.011 if cos > 0 else 0.06) * cos
        reach = (0.025 if bald else 0.02) + max(0.029 - wide, 0)
        figure.add((0, 0.932, reach), (0, 0.9, reach), [wide, wide * 0.85], who.skin, 0.35, cap=True)
        dark = _plain((0.28, 0.19, 0.16), 0.4, 0.85)
        for side in (-1, 1):
            eye = (side * 0.018, 0.93, 0.044)
            if cos * eye[2] - side * 0.018 * sin > 0.015:
                figure.add(eye, eye, [0.0042, 0.0042], dark, 0.4, cap=True)
        if cos > 0.3:
            figure.add((-0.012, 0.895, 0.04), (0.012, 0.895, 0.04), [0.003, 0.003], dark, 0.4, cap=True)
    back = 0.6 if cos < 0 else -0.2
    if who.hair_style == "bob":
        figure.add((0, 0.94, -0.012), (0, 0.865, -0.016), [0.055, 0.06, 0.062], hair, back)
    elif who.hair_style == "long":
        figure.add((0, 0.94, -0.02), (0, 0.7, -0.05), [0.056, 0.064, 0.068, 0.05], hair, back)
    elif who.hair_style == "ponytail":
        figure.add((0, 0.96, -0.06), (0, 0.77, -0.085), [0.018, 0.03, 0.012], hair, back, cap=True)
    elif who.hair_style == "bun":
        figure.add((0, 0.995, -0.03), (0, 1.0, -0.03), [0.027, 0.027], hair, 0.32, cap=True)
    if who.hat_style == "cap":
        figure.add((0, 0.952, 0), (0, 1.002, 0), [0.056, 0.056, 0.052, 0.043, 0.026], who.hat, 0.7)
        figure.add(
            (0, 0.955, 0.03), (0, 0.95, 0.1), [0.026, 0.02], who.hat, 0.71 if cos > 0 else 0.2, cap=True
        )
    elif who.hat_style == "beanie":
        dome = [0.058, 0.058, 0.057, 0.053, 0.045, 0.028]
        figure.add((0, 0.945, 0), (0, 1.012, -0.01), dome, who.hat, 0.7)
    elif who.hat_style == "brimmed":
        figure.add((0, 0.96, 0), (0, 1.02, 0), [0.056, 0.05, 0.045], who.hat, 0.7)
        across = (0.085 * cos, 0.957, 0.085 * sin)  # a disc looks equally wide from everywhere
        figure.add((-across[0], 0.957, -across[2]), across, [0.012, 0.02, 0.012], who.hat, 0.71, cap=True)


def _add_bag(figure: _Figure, who: Identity, hand: Point) -> None:
    side = 0.125 * who.girth
    strap = replace(who.bag, ink=who.bag.accent, pattern="plain")
    if who.bag_style == "backpack":
        deep = 0.075 * who.girth + 0.045
        wide = figure.around(0.088, 0.055)
        figure.add((0, 0.82, -deep), (0, 0.6, -deep), np.array([0.75, 1, 1, 0.95]) * wide, who.bag)
        figure.add((0, 0.67, -deep - 0.03), (0, 0.63, -deep - 0.03), [0.7 * wide, 0.7 * wide], strap)
        for lateral in (-0.062, 0.062):
            figure.add((lateral, 0.835, 0.05), (lateral * 1.1, 0.64, 0.085), [0.013, 0.013], strap, cap=True)
    elif who.bag_style == "messenger":
        for forward in (-0.085, 0.085):
            figure.add((-0.07, 0.835, forward * 0.6), (side, 0.52, forward), [0.012, 0.012], strap)
        wide = figure.around(0.045, 0.085)
        figure.add((side + 0.02, 0.54, 0), (side + 0.02, 0.41, 0), [wide, wide], who.bag, 0.03)
    elif who.bag_style == "handbag":
        lateral, up, forward = hand
        wide = figure.around(0.04, 0.075)
        figure.add(hand, (lateral, up - 0.07, forward), [0.012, 0.03], strap, 0.01)
        figure.add(
            (lateral, up - 0.06, forward), (lateral, up - 0.16, forward), [0.8 * wide, wide], who.bag, 0.02
        )
    elif who.bag_style == "tote":
        wide = figure.around(0.05, 0.09)
        figure.add((side, 0.83, 0), (side + 0.02, 0.66, 0), [0.012, 0.012], strap, 0.05)
        figure.add((side + 0.03, 0.67, 0), (side + 0.03, 0.47, 0), [wide, wide * 0.9], who.bag, 0.04)


def _draw_occluder(canvas: Canvas, rng: np.random.Generator) -> None:
    """Something in front of the person: a pole, a box, or a bush at a lower corner."""
    height, width = canvas.x.shape
    cloth = _cloth(rng, _pick(rng, plain=3, hoops=1), warmth=(0.1, 0.3))
    kind = _pick(rng, pole=2, box=2, bush=1)
    edge = rng.choice([-1, 1])
    middle = 0.5 * width * (1 + edge * rng.uniform(0.35, 0.8))
    if kind == "pole":
        radius = width * rng.uniform(0.05, 0.12)
        canvas.tube((middle, -5), (middle, height + 5), [radius, radius], cloth, height)
    elif kind == "box":
        radius = width * rng.uniform(0.2, 0.35)
        canvas.tube(
            (middle, height * rng.uniform(0.72, 0.85)), (middle, height + 5), [radius, radius], cloth, height
        )
    else:
        leaves = Cloth(Ink((0.2, 0.36, 0.15), 0.8, 0.25), Ink((0.34, 0.5, 0.2), 0.9, 0.28), "dots", 0.03)
        radius = width * rng.uniform(0.2, 0.3)
        canvas.tube((middle, height * 0.92), (middle, height), [radius, radius], leaves, height, cap=True)


def render(
    who: Identity, camera: Camera, rng: np.random.Generator, height: int = 160, width: int = 64
) -> Image.Image:
    """Draw one image of a person.

    Args:
        who: from make_identity.
        camera: from make_camera.
        rng: draws the moment: pose, position, background, occlusion, noise.
        height, width: of the image, in pixels.

    Returns:
        An RGB image; its three channels are equal unless the camera's spectrum is visible.
    """
    tall, broad = height * SUPERSAMPLE, width * SUPERSAMPLE
    canvas = Canvas(tall, broad, camera)
    _draw_background(canvas, rng)

    anywhere = rng.random() < 0.03
    facing = rng.uniform(-math.pi, math.pi) if anywhere else camera.facing + rng.normal(0, 0.2)
    frame = min(tall, 2.4 * broad)  # a square image still shows the complete person
    unit = 0.9 * frame * who.height * rng.uniform(0.97, 1.03)
    foot = (broad * (0.5 + rng.normal(0, 0.03)), tall * (0.965 + rng.normal(0, 0.01)))
    shadow = _plain((0.1, 0.1, 0.1), 0.05, 0.2)
    if camera.spectrum != "thermal":
        blob = np.hypot((canvas.x - foot[0]) / (0.2 * unit), (canvas.y - foot[1]) / (0.035 * unit))
        canvas.blend((slice(None), slice(None)), np.clip(1.1 - blob, 0, 0.6), canvas.ink(shadow.ink))

    figure = _Figure(canvas, facing, foot, unit)
    stride = rng.uniform(-0.42, 0.42)
    _add_legs(figure, who, stride)
    _add_torso(figure, who)
    hand = _add_arms(
        figure, who, 0.9 * stride + rng.normal(0, 0.08), rng.choice([0.15, 0.35, 1.2], 2, p=[0.5, 0.35, 0.15])
    )
    _add_head(figure, who)
    _add_bag(figure, who, hand)
    figure.draw()
    if rng.random() < 0.06:
        _draw_occluder(canvas, rng)
    return _develop(canvas, rng)


def _develop(canvas: Canvas, rng: np.random.Generator) -> Image.Image:
    """Turn reflectance into pixels: illumination, sensor, optics, noise, eight bits."""
    camera = canvas.camera
    pixels = canvas.pixels
    tall, broad, channels = pixels.shape
    x, y = canvas.x / broad - 0.5, canvas.y / tall - 0.5
    if camera.spectrum == "visible":
        light = 1 + rng.uniform(-0.4, 0.4) * x + rng.uniform(-0.5, 0.5) * y
    elif camera.spectrum == "infrared":
        centre = rng.normal(0, 0.3, 2)
        squared = 0.7 * (x - centre[0]) ** 2 + (y - centre[1]) ** 2
        light = 1.15 / (1 + rng.uniform(0.4, 0.9) * squared)  # weaker with distance, but never zero
    else:
        light = np.ones_like(x)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = (grey + camera.saturation * (pixels - grey)) * light[..., None]
    pixels = pixels * np.float32(camera.cast) * rng.normal(1, 0.12, channels) * camera.brightness
    pixels = pixels * math.exp(rng.uniform(-0.45, 0.45))  # automatic exposure, different in every image
    pixels = 0.5 + (pixels - 0.5) * camera.contrast
    pixels = pixels.reshape(
        tall // SUPERSAMPLE, SUPERSAMPLE, broad // SUPERSAMPLE, SUPERSAMPLE, channels
    ).mean((1, 3))
    image = Image.fromarray(np.uint8(255 * np.clip(pixels, 0, 1)).repeat(3 // channels, axis=2))
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.4) * len(pixels) / 160))
    noise = rng.normal(0, 255 * camera.noise, (*pixels.shape[:2], channels))
    return Image.fromarray(np.uint8(np.clip(np.asarray(image) + noise, 0, 255)))
