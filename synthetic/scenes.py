"""What a camera sees: surfaces, a place, what stands in front of it, and the light of an image.

Every surface has a visible colour, a near-infrared reflectance and a warmth. For plain cloth they are drawn
independently, so colour helps within the visible modality and misleads across modalities. Of a pattern's two
inks, the same one is lighter in visible light and in near infrared. A camera has a viewpoint, backgrounds,
light, blur and noise.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

SUPERSAMPLE = 2  # drawn pixels per image pixel and axis
# The second number in each generator's seed, so that no two kinds of draws share random numbers.
SPLIT, IDENTITY, CAMERA, BACKGROUND, MOMENT = range(5)


# ---------------------------------------------------------------------------- surfaces


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


PALETTE = [
    *[(0.10, 0.10, 0.11), (0.92, 0.92, 0.90), (0.50, 0.51, 0.53), (0.11, 0.15, 0.36), (0.16, 0.36, 0.72)],
    *[(0.52, 0.74, 0.92), (0.78, 0.12, 0.14), (0.44, 0.08, 0.16), (0.13, 0.46, 0.24), (0.40, 0.42, 0.20)],
    *[(0.94, 0.80, 0.22), (0.92, 0.48, 0.14), (0.94, 0.62, 0.72), (0.46, 0.24, 0.56), (0.82, 0.73, 0.56)],
    *[(0.42, 0.28, 0.17), (0.20, 0.62, 0.62)],
]


def pick(rng: np.random.Generator, **weights: float) -> str:
    """One of the names, drawn with these weights."""
    names, values = list(weights), np.array(list(weights.values()), float)
    return names[rng.choice(len(names), p=values / values.sum())]


def draw_colour(rng: np.random.Generator, palette: list = PALETTE) -> tuple[float, float, float]:
    """A colour near one of the palette."""
    return tuple(np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 0.03, 3), 0, 1).tolist())


def plain_cloth(colour: tuple, infrared: float, thermal: float, gloss: float = 0.0) -> Cloth:
    """A surface of one ink."""
    ink = Ink(colour, infrared, thermal)
    return Cloth(ink, ink, gloss=gloss)


def draw_cloth(rng: np.random.Generator, pattern: str = "plain", warmth: tuple = (0.3, 0.75)) -> Cloth:
    """A random surface of a garment, with gloss, quilting and the two inks of a pattern."""
    lighter = rng.choice([-1, 1])  # which ink is lighter: the accent (1) or the other (-1)
    ink = accent = PALETTE[0]
    while lighter * (np.mean(accent) - np.mean(ink)) < 0.25:  # so that a grey picture shows the pattern too
        ink, accent = draw_colour(rng), draw_colour(rng)
    infrared = rng.uniform(0.12, 0.38) if lighter > 0 else rng.uniform(0.6, 0.9)
    if pattern == "plain":
        ink, infrared = draw_colour(rng), rng.uniform(0.3, 0.7)
    infrared_accent = float(np.clip(infrared + lighter * rng.uniform(0.4, 0.55), 0.05, 0.95))
    warm = rng.uniform(*warmth)
    gloss, quilt = float(rng.choice([0, 0, 0.3, 0.5])), bool(rng.random() < 0.15 and pattern == "plain")
    other = Ink(accent, infrared_accent, warm + rng.choice([-0.12, 0.12]))
    return Cloth(Ink(ink, infrared, warm), other, pattern, rng.choice([0.105, 0.14, 0.18]), gloss, quilt)


# ---------------------------------------------------------------------------- cameras and their pictures


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


def make_camera(seed: int, modality: str, camid: int, thermal: bool = False) -> Camera:
    """Return what a camera's images share; thermal: infrared images show warmth, as RegDB's do."""
    visible = modality == "visible"
    key = (seed, BACKGROUND, int(not visible), camid)
    rng = np.random.default_rng([seed, CAMERA, *key[2:]])
    return Camera(
        spectrum="thermal" if thermal and not visible else modality,
        key=key,
        facing=rng.uniform(-0.5, 0.5),  # people come towards the camera
        elevation=rng.uniform(0.05, 0.25),
        light=rng.uniform(-1.0, 1.0) * visible,  # an infrared camera's illuminator is next to its lens
        brightness=rng.uniform(*(0.7, 1.15) if visible else (0.8, 1.1)),
        contrast=rng.uniform(0.75, 1.1),
        saturation=rng.uniform(0.1, 0.5),
        cast=tuple(rng.uniform(0.8, 1.15, 3).tolist()) if visible else (1.0,),
        blur=rng.uniform(*(0.2, 0.5) if visible else (0.3, 0.6)),
        noise=rng.uniform(*(0.003, 0.01) if visible else (0.006, 0.016)),
    )


# The accent's share in a cloth: at arc length `around` and `along`, in body heights, a and b of a period p,
# and at an angle from the front. What is not here is plain. A print is on the chest and on the back.
PATTERNS = {
    "hoops": lambda a, b, p, along, azimuth: b < p / 2,
    "stripes": lambda a, b, p, along, azimuth: a < p / 2,
    "checks": lambda a, b, p, along, azimuth: ((a < p / 2) * 0.5 + (b < p / 2) * 0.5) ** 1.3,
    "dots": lambda a, b, p, along, azimuth: np.hypot(a - p / 2, b - p / 2) < 0.33 * p,
    "print": lambda a, b, p, along, azimuth: (
        np.hypot(np.abs((azimuth + math.pi / 2) % math.pi - math.pi / 2) / 0.75, (along - 0.17) / 0.065) < 1
    ),
    "yoke": lambda a, b, p, along, azimuth: along < 0.13,
    "band": lambda a, b, p, along, azimuth: (along > 0.12) & (along < 0.2),
    "side": lambda a, b, p, along, azimuth: np.abs(np.sin(azimuth)) > 0.8,
}


class Canvas:
    """An image being drawn, in one spectrum: pixels (height, width, 3 or 1) float32 in [0, 1]."""

    def __init__(self, height: int, width: int, camera: Camera):
        self.camera = camera
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.pixels = np.zeros((height, width, 3 if camera.spectrum == "visible" else 1), np.float32)

    def ink(self, ink: Ink) -> np.ndarray:
        """What the canvas's camera sees of ink: (channels,) float32."""
        return np.atleast_1d(np.float32(getattr(ink, self.camera.spectrum)))

    def blend(self, alpha: np.ndarray, colour: np.ndarray, where=...) -> None:
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
        rows, columns = (
            slice(max(0, int(min(ends) - margin)), max(0, int(max(ends) + margin)))
            for ends in ((y0, y1), (x0, x1))
        )
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

        angle = np.arcsin(np.clip(across / np.maximum(radius, 1e-3), -1, 1))
        azimuth = (angle - turn + math.pi) % (2 * math.pi) - math.pi
        along = along / unit
        colour = self.ink(cloth.ink)
        if cloth.pattern in PATTERNS:
            period, around = cloth.period, azimuth * radius.mean() / unit
            mix = PATTERNS[cloth.pattern](around % period, along % period, period, along, azimuth)
            mix = np.float32(mix)[..., None]
            colour = colour * (1 - mix) + self.ink(cloth.accent) * mix
        if opening:
            colour = np.where(np.abs(azimuth)[..., None] < opening, self.ink(inner.ink), colour)
        shaded = colour * self._shade(cloth, angle, along)[..., None]
        self.blend(np.clip(0.5 - distance, 0, 1), shaded, (rows, columns))

    def _shade(self, cloth: Cloth, angle: np.ndarray, along: np.ndarray) -> np.ndarray:
        """Light on a round surface: from the side, in infrared from the camera, almost none in thermal."""
        if self.camera.spectrum == "thermal":
            return 0.9 + 0.1 * np.cos(angle)
        toward = np.maximum(np.cos(angle - self.camera.light), 0)
        shade = 0.58 + 0.42 * toward + cloth.gloss * toward**12
        shade *= 1 + 0.05 * np.sin(47 * along + 3 * angle)  # folds
        if cloth.quilt:
            shade *= 0.72 + 0.28 * np.abs(np.sin(math.pi * along / 0.07))
        return shade

    def soft_noise(self, rng: np.random.Generator, cells: int) -> np.ndarray:
        """Smooth random texture (height, width) in about [-1, 1], with `cells` cells across the width."""
        height, width = self.x.shape
        grid = rng.normal(0, 0.5, (max(2, cells * height // width), cells)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


# Where a wall has its second ink, at (x, y) in heights of the image; plain: a skirting board.
WALLS = {
    "plain": lambda x, y, horizon: y > horizon - 0.035,
    "bricks": lambda x, y, horizon: (
        (y % 0.045 < 0.008) | ((x + 0.05 * (np.floor(y / 0.045) % 2)) % 0.1 < 0.008)
    ),
    "tiles": lambda x, y, horizon: (y % 0.11 < 0.008) | (x % 0.11 < 0.008),
    "panels": lambda x, y, horizon: x % 0.16 < 0.012,
}
# What stands before it, at a distance `beside` from the nearest one's middle: its outline and its core.
THINGS = {
    "doors": lambda x, y, beside, horizon: (
        (beside < 0.13) & (y > horizon - 0.55),
        (beside < 0.11) & (y > horizon - 0.53) & (np.hypot(beside - 0.09, y - horizon + 0.25) > 0.012),
    ),
    "windows": lambda x, y, beside, horizon: (
        (beside < 0.15) & (np.abs(y - 0.26) < 0.15),
        (beside < 0.135) & (np.abs(y - 0.26) < 0.135) & (beside > 0.01) & (np.abs(y - 0.24) > 0.01),
    ),
    "posters": lambda x, y, beside, horizon: (
        (beside < 0.10) & (np.abs(y - 0.3) < 0.12),
        (beside < 0.08) & (np.abs(y - 0.26) < 0.06),
    ),
    "shelves": lambda x, y, beside, horizon: (
        shelf := (y % 0.14 < 0.12) & (beside < 0.2),
        shelf & (np.sin(np.floor(x / 0.035) * 12.9 + np.floor(y / 0.14) * 78.2) > -0.1),
    ),
    "pillars": lambda x, y, beside, horizon: (beside < 0.06, beside < 0.04),
}
THINGS["trunks"] = THINGS["pillars"]


def draw_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Fill the canvas with one of its camera's three backgrounds, at a random offset and zoom."""
    place = np.random.default_rng([*canvas.camera.key, int(rng.integers(3))])
    height = canvas.x.shape[0]
    zoom = rng.uniform(0.75, 1.2)
    x, y = canvas.x / height * zoom + rng.uniform(0, 10), canvas.y / height + rng.uniform(-0.06, 0.06)
    horizon = place.uniform(0.55, 0.8)
    inks = []
    for _ in range(5):
        grey, infrared, warmth = place.uniform(0.25, 0.85), place.uniform(0.1, 0.75), place.uniform(0.08, 0.4)
        inks.append(Ink(tuple(0.65 * grey + 0.35 * np.array(draw_colour(place))), infrared, warmth))
    texture = pick(place, plain=2, bricks=1, tiles=1, panels=1, foliage=0.8)
    things = {"doors": 2, "windows": 2, "posters": 1, "shelves": 1}
    if texture == "foliage":  # leaves are dark by day and bright in near infrared
        inks[:2] = Ink((0.20, 0.33, 0.14), 0.75, 0.25), Ink((0.36, 0.50, 0.22), 0.9, 0.3)
        things = {"trunks": 1}
        second = np.clip(canvas.soft_noise(rng, 14) * 1.5 + 0.4, 0, 1)
    else:
        second = WALLS[texture](x, y, horizon)
    wall, detail, item, frame, floor = map(canvas.ink, inks)
    canvas.pixels[:] = wall
    canvas.blend(second, detail)

    period = place.uniform(0.45, 0.9)
    beside = np.abs(x % period - period / 2)
    kind = pick(place, nothing=1, pillars=1, **things)
    if kind != "nothing":
        outline, core = THINGS[kind](x, y, beside, horizon)
        canvas.blend(outline, frame)
        canvas.blend(core, item)

    depth = 1 / np.maximum(y - horizon + 0.12, 0.02)
    sideways = (canvas.x / height - 0.2) * depth + rng.uniform(0, 10)
    joints = {"slabs": (sideways % 0.9 < 0.05) | (depth % 0.7 < 0.06), "planks": sideways % 0.4 < 0.04}
    paving = joints.get(pick(place, plain=1, slabs=1, planks=1), np.zeros(x.shape, bool))
    canvas.blend(np.clip((y - horizon) * height, 0, 1), floor * (1 - 0.25 * paving[..., None]))
    canvas.pixels *= (1 + 0.10 * canvas.soft_noise(rng, 5) + 0.04 * canvas.soft_noise(rng, 40))[..., None]
    tone = canvas.pixels.mean((0, 1))
    canvas.pixels[:] = tone + 0.6 * (canvas.pixels - tone)  # less contrast than the person in front
    if canvas.camera.spectrum == "infrared":  # the background is far from the illuminator
        canvas.pixels *= rng.uniform(0.45, 0.9)


def draw_occluder(canvas: Canvas, rng: np.random.Generator) -> None:
    """Something in front of the person: a pole, a box, or a bush at a lower corner."""
    height, width = canvas.x.shape
    cloth = draw_cloth(rng, pick(rng, plain=3, hoops=1), warmth=(0.1, 0.3))
    kind = pick(rng, pole=2, box=2, bush=1)
    edge = rng.choice([-1, 1])
    middle = 0.5 * width * (1 + edge * rng.uniform(0.35, 0.8))
    radius = width * rng.uniform(*{"pole": (0.05, 0.12), "box": (0.2, 0.35), "bush": (0.2, 0.3)}[kind])
    top, bottom = -5, height + 5
    if kind == "box":
        top = height * rng.uniform(0.72, 0.85)
    elif kind == "bush":
        top, bottom = height * 0.92, height
        cloth = Cloth(Ink((0.2, 0.36, 0.15), 0.8, 0.25), Ink((0.34, 0.5, 0.2), 0.9, 0.28), "dots", 0.03)
    canvas.tube((middle, top), (middle, bottom), [radius, radius], cloth, height, cap=kind == "bush")


def develop(canvas: Canvas, rng: np.random.Generator) -> Image.Image:
    """Turn reflectance into pixels: illumination, sensor, optics, noise, eight bits."""
    camera, pixels = canvas.camera, canvas.pixels
    tall, broad, channels = pixels.shape
    x, y = canvas.x / broad - 0.5, canvas.y / tall - 0.5
    light = np.ones_like(x)
    if camera.spectrum == "visible":
        light = 1 + rng.uniform(-0.4, 0.4) * x + rng.uniform(-0.5, 0.5) * y
    elif camera.spectrum == "infrared":
        centre = rng.normal(0, 0.3, 2)
        squared = 0.7 * (x - centre[0]) ** 2 + (y - centre[1]) ** 2
        light = 1.15 / (1 + rng.uniform(0.4, 0.9) * squared)  # weaker with distance, but never zero
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = (grey + camera.saturation * (pixels - grey)) * light[..., None]
    pixels = pixels * np.float32(camera.cast) * rng.normal(1, 0.12, channels) * camera.brightness
    pixels = pixels * math.exp(rng.uniform(-0.45, 0.45))  # automatic exposure, different in every image
    pixels = 0.5 + (pixels - 0.5) * camera.contrast
    size = (tall // SUPERSAMPLE, SUPERSAMPLE, broad // SUPERSAMPLE, SUPERSAMPLE, channels)
    pixels = pixels.reshape(size).mean((1, 3))
    image = Image.fromarray(np.uint8(255 * np.clip(pixels, 0, 1)).repeat(3 // channels, axis=2))
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * rng.uniform(0.7, 1.4) * len(pixels) / 160))
    noise = rng.normal(0, 255 * camera.noise, pixels.shape)
    return Image.fromarray(np.uint8(np.clip(np.asarray(image) + noise, 0, 255)))
