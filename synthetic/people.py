"""Drawings of people: an identity, a camera and a moment make an image, visible, near-infrared or thermal.

An identity has lasting traits (build, hair, garments, bag, shoes), whose shape, cut, pattern and material are
the same in every spectrum. A moment has a pose, a shift, its light and perhaps an occlusion. Cameras and
surfaces are in scenes.py. Published numbers hang on these images: the order of all draws must stay.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from synthetic.scenes import (
    IDENTITY,
    SUPERSAMPLE,
    Camera,
    Canvas,
    Cloth,
    Ink,
    develop,
    draw_background,
    draw_cloth,
    draw_colour,
    draw_occluder,
    pick,
    plain_cloth,
)

SKIN = [(0.96, 0.80, 0.70), (0.90, 0.70, 0.56), (0.78, 0.57, 0.43), (0.58, 0.40, 0.29), (0.38, 0.25, 0.18)]
HAIR = [(0.08, 0.07, 0.07), (0.20, 0.13, 0.09), (0.42, 0.27, 0.15), (0.80, 0.64, 0.36), (0.62, 0.60, 0.58)]


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


def make_identity(seed: int, pid: int) -> Identity:
    """Return the lasting traits of person pid; they depend only on (seed, pid)."""
    rng = np.random.default_rng([seed, IDENTITY, pid])
    top = pick(rng, vest=1.5, shirt=2, longsleeve=2, jacket=2, coat=2)
    pattern = pick(
        rng, plain=0.6, hoops=2, stripes=1.5, checks=1.5, dots=1.5, print=1.5, yoke=1.5, band=1.5, raglan=1.5
    )
    bottom_cut = pick(rng, slim=1.5, straight=1.5, wide=2, shorts=2, skirt=2, longskirt=1.5)
    return Identity(
        height=rng.uniform(0.84, 1.06),
        girth=rng.choice([0.8, 1.0, 1.26]) + rng.uniform(-0.04, 0.04),
        shoulders=rng.uniform(0.92, 1.1),
        skin=plain_cloth(draw_colour(rng, SKIN), rng.uniform(0.68, 0.8), rng.uniform(0.88, 0.98)),
        hair=plain_cloth(draw_colour(rng, HAIR), rng.uniform(0.12, 0.5), 0.6, gloss=0.2),
        hair_style=pick(rng, bald=1, short=3, bob=2, long=3, ponytail=2, bun=1.5, afro=1.5),
        hat=draw_cloth(rng, warmth=(0.35, 0.55)),
        hat_style=pick(rng, none=3, cap=1.2, beanie=1.2, brimmed=1.2),
        top=draw_cloth(rng, pattern),
        sleeves={"vest": "none", "shirt": "short"}.get(top, "long"),
        hem={"jacket": 0.47, "coat": rng.uniform(0.24, 0.34)}.get(top, rng.choice([0.455, 0.53])),
        opening=float(top in ("jacket", "coat")) * rng.choice([0.0, 0.3, 0.55]),
        inner=draw_cloth(rng),
        bottom=draw_cloth(rng, pick(rng, plain=1.5, stripes=1.5, checks=1.5, side=2, dots=1.5)),
        bottom_cut=bottom_cut,
        shoes=draw_cloth(rng, warmth=(0.25, 0.45)),
        boots=bool(rng.random() < 0.25),
        bag=draw_cloth(rng, pick(rng, plain=3, yoke=1), warmth=(0.1, 0.3)),
        bag_style=pick(rng, none=2, backpack=2, messenger=2, handbag=1.5, tote=1.5),
    )


Point = tuple[float, float, float]  # lateral, up, forward, in body heights from the point between the feet


class _Figure:
    """Projects points of the body and collects its tubes, then draws them from far to near."""

    def __init__(self, canvas: Canvas, facing: float, foot: tuple[float, float], unit: float):
        self.canvas, self.facing, self.foot, self.unit = canvas, facing, foot, unit
        self.parts: list[tuple[float, tuple, dict]] = []

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
        self.parts.append((0.5 * (near_a + near_b) + layer, (a, b, radii, cloth), style))

    def round(self, *tube, **style) -> None:
        """Collect a tube with round ends."""
        self.add(*tube, cap=True, **style)

    def draw(self) -> None:
        for _, tube, style in sorted(self.parts, key=lambda part: part[0]):
            self.canvas.tube(*tube, self.unit, self.facing, **style)


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


# Radii at the hip, at the knee and at the ankle. A person's girth widens the first two.
LEG = [0.05, 0.034, 0.022]
TROUSERS = {
    "slim": [0.055, 0.042, 0.032],
    "straight": [0.058, 0.052, 0.046],
    "wide": [0.062, 0.068, 0.078],
    "shorts": [0.062, 0.066, 0.0],
}
SKIRTS = {"skirt": (0.3, 1.45), "longskirt": (0.1, 1.6)}  # height of the hem, width there


def _add_legs(figure: _Figure, who: Identity, stride: float) -> None:
    g = who.girth
    widen = np.array([g, g, 1])
    leg, trousers = widen * LEG, widen * TROUSERS.get(who.bottom_cut, LEG)
    for side in (-1, 1):
        root, bend = (side * 0.048 * g, 0.5, 0), -0.5 * abs(stride)
        hip, knee, ankle = _limb(root, side * stride, bend, (0.235, 0.235), side * 0.04)
        toe = (ankle[0], ankle[1] - 0.008, ankle[2] + 0.075)
        figure.round(hip, knee, leg[:2], who.skin, -2)
        figure.round(knee, ankle, leg[1:], who.skin, -2)
        figure.round(ankle, toe, [0.027, 0.022], who.shoes, -1.9)
        if who.bottom_cut == "shorts":
            figure.add(hip, _between(hip, knee, 0.85), trousers[:2], who.bottom, -1.8)
        elif who.bottom_cut in TROUSERS:
            figure.round(hip, knee, trousers[:2], who.bottom, -1.8)
            figure.add(knee, _between(knee, ankle, 0.95), trousers[1:], who.bottom, -1.8)
        if who.boots:
            radius = max(0.04, TROUSERS["slim"][1] * g + 0.004)
            figure.add(_between(knee, ankle, 0.3), ankle, [radius, 0.036], who.shoes, -1.7)
    wide = 0.105 * g
    waist = figure.around(wide, 0.075 * g) * np.array([0.85, 1, 0.8])
    figure.add((0, 0.58, 0), (0, 0.465, 0), waist, who.bottom, -1.6)
    if who.bottom_cut in SKIRTS:
        hem, flare = SKIRTS[who.bottom_cut]
        radii = figure.around(wide, 0.08 * g) * np.linspace(0.8, flare + abs(stride) * 0.3, 4) ** 0.9
        figure.add((0, 0.6, 0), (0, hem, 0), radii, who.bottom, -1.5)


def _add_torso(figure: _Figure, who: Identity) -> None:
    g = who.girth
    chest = 0.108 * who.shoulders * g
    heights = [0.24, 0.46, 0.53, 0.62, 0.74, 0.8, 0.825, 0.85]
    widths = [0.15 * g, 0.112 * g, 0.104 * g, 0.088 * g, 0.098 * g, chest, chest * 0.85, 0.045]
    widths = np.interp(np.linspace(0.85, who.hem, 12), heights, widths)
    loose = 1.12 if who.hem < 0.5 and who.sleeves == "long" else 1.0
    radii = np.array([figure.around(wide, 0.7 * wide) for wide in widths]) * loose
    figure.add((0, 0.9, 0.005), (0, 0.82, 0), [0.03, 0.034], who.skin, -1.2)
    figure.add((0, 0.85, 0), (0, who.hem, 0), radii, who.top, inner=who.inner, opening=who.opening)


def _add_arms(figure: _Figure, who: Identity, swing: float, bends: np.ndarray) -> Point:
    """Collect both arms; return where the right hand is."""
    g = who.girth**0.7
    sleeve = who.top
    if sleeve.pattern in ("print", "band", "raglan"):
        ink = sleeve.accent if sleeve.pattern == "raglan" else sleeve.ink
        sleeve = replace(sleeve, ink=ink, pattern="plain")
    radii = np.array([0.036, 0.032, 0.029]) * g
    for side, bend in zip((-1, 1), bends, strict=True):
        root = (side * 0.104 * who.shoulders * who.girth, 0.805, 0)
        shoulder, elbow, hand = _limb(root, -side * swing, bend, (0.17, 0.16), side * 0.14)
        layer = 0.02 * math.copysign(1, -side * math.sin(figure.facing))
        if who.sleeves != "long":
            figure.round(shoulder, elbow, [0.03 * g, 0.025 * g], who.skin, layer)
            figure.round(elbow, hand, [0.025 * g, 0.018 * g], who.skin, layer)
        figure.round(hand, _between(elbow, hand, 1.12), [0.022, 0.02], who.skin, layer)
        if who.sleeves != "none":
            end = elbow if who.sleeves == "long" else _between(shoulder, elbow, 0.62)
            figure.round(shoulder, _between(shoulder, end, 0.3), radii[[0, 0]], sleeve, layer + 0.001)
            figure.add(shoulder, end, radii[:2], sleeve, layer + 0.001, cap=end == elbow)
        if who.sleeves == "long":
            figure.round(elbow, hand, radii[1:], sleeve, layer + 0.002)
    return hand


# What is added to a head: start, end, radii. What hangs down is behind it, a bun on top of it.
HAIRSTYLES = {
    "bob": ((0, 0.94, -0.012), (0, 0.865, -0.016), [0.055, 0.06, 0.062]),
    "long": ((0, 0.94, -0.02), (0, 0.7, -0.05), [0.056, 0.064, 0.068, 0.05]),
    "ponytail": ((0, 0.96, -0.06), (0, 0.77, -0.085), [0.018, 0.03, 0.012]),
    "bun": ((0, 0.995, -0.03), (0, 1.0, -0.03), [0.027, 0.027]),
}
HATS = {
    "cap": ((0, 0.952, 0), (0, 1.002, 0), [0.056, 0.056, 0.052, 0.043, 0.026]),
    "beanie": ((0, 0.945, 0), (0, 1.012, -0.01), [0.058, 0.058, 0.057, 0.053, 0.045, 0.028]),
    "brimmed": ((0, 0.96, 0), (0, 1.02, 0), [0.056, 0.05, 0.045]),
}


def _add_head(figure: _Figure, who: Identity) -> None:
    cos, sin = math.cos(figure.facing), math.sin(figure.facing)
    style, bald = who.hair_style, who.hair_style == "bald"
    hair = who.skin if bald else who.hair
    size = 1.55 if style == "afro" and who.hat_style == "none" else 1.0 if bald else 1.12
    figure.round((0, 0.945, -0.006), (0, 0.915, -0.006), [0.048 * size, 0.046 * size], hair, 0.3)
    if cos > -0.4:  # the face turns away with the head
        wide = 0.029 + (0.011 if cos > 0 else 0.06) * cos
        reach = (0.025 if bald else 0.02) + max(0.029 - wide, 0)
        figure.round((0, 0.932, reach), (0, 0.9, reach), [wide, wide * 0.85], who.skin, 0.35)
        dark = plain_cloth((0.28, 0.19, 0.16), 0.4, 0.85)
        for lateral in (-0.018, 0.018):
            if cos * 0.044 - lateral * sin > 0.015:
                figure.round((lateral, 0.93, 0.044), (lateral, 0.93, 0.044), [0.0042, 0.0042], dark, 0.4)
        if cos > 0.3:
            figure.round((-0.012, 0.895, 0.04), (0.012, 0.895, 0.04), [0.003, 0.003], dark, 0.4)
    if style in HAIRSTYLES:
        layer = 0.32 if style == "bun" else 0.6 if cos < 0 else -0.2
        figure.add(*HAIRSTYLES[style], hair, layer, cap=style in ("ponytail", "bun"))
    if who.hat_style in HATS:
        figure.add(*HATS[who.hat_style], who.hat, 0.7)
    if who.hat_style == "cap":
        figure.round((0, 0.955, 0.03), (0, 0.95, 0.1), [0.026, 0.02], who.hat, 0.71 if cos > 0 else 0.2)
    elif who.hat_style == "brimmed":
        x, z = 0.085 * cos, 0.085 * sin  # a disc looks equally wide from everywhere
        figure.round((-x, 0.957, -z), (x, 0.957, z), [0.012, 0.02, 0.012], who.hat, 0.71)


def _add_bag(figure: _Figure, who: Identity, hand: Point) -> None:
    side, style, bag = 0.125 * who.girth, who.bag_style, who.bag
    strap = replace(bag, ink=bag.accent, pattern="plain")
    if style == "backpack":
        deep = 0.075 * who.girth + 0.045
        wide = figure.around(0.088, 0.055)
        figure.add((0, 0.82, -deep), (0, 0.6, -deep), np.array([0.75, 1, 1, 0.95]) * wide, bag)
        figure.add((0, 0.67, -deep - 0.03), (0, 0.63, -deep - 0.03), [0.7 * wide, 0.7 * wide], strap)
        for lateral in (-0.062, 0.062):
            figure.round((lateral, 0.835, 0.05), (lateral * 1.1, 0.64, 0.085), [0.013, 0.013], strap)
    elif style == "messenger":
        for forward in (-0.085, 0.085):
            figure.add((-0.07, 0.835, forward * 0.6), (side, 0.52, forward), [0.012, 0.012], strap)
        wide = figure.around(0.045, 0.085)
        figure.add((side + 0.02, 0.54, 0), (side + 0.02, 0.41, 0), [wide, wide], bag, 0.03)
    elif style == "handbag":
        x, y, z = hand
        wide = figure.around(0.04, 0.075)
        figure.add(hand, (x, y - 0.07, z), [0.012, 0.03], strap, 0.01)
        figure.add((x, y - 0.06, z), (x, y - 0.16, z), [0.8 * wide, wide], bag, 0.02)
    elif style == "tote":
        wide = figure.around(0.05, 0.09)
        figure.add((side, 0.83, 0), (side + 0.02, 0.66, 0), [0.012, 0.012], strap, 0.05)
        figure.add((side + 0.03, 0.67, 0), (side + 0.03, 0.47, 0), [wide, wide * 0.9], bag, 0.04)


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
    draw_background(canvas, rng)

    anywhere = rng.random() < 0.03
    facing = rng.uniform(-math.pi, math.pi) if anywhere else camera.facing + rng.normal(0, 0.2)
    frame = min(tall, 2.4 * broad)  # a square image still shows the complete person
    unit = 0.9 * frame * who.height * rng.uniform(0.97, 1.03)
    foot = (broad * (0.5 + rng.normal(0, 0.03)), tall * (0.965 + rng.normal(0, 0.01)))
    if camera.spectrum != "thermal":
        shadow = np.hypot((canvas.x - foot[0]) / (0.2 * unit), (canvas.y - foot[1]) / (0.035 * unit))
        canvas.blend(np.clip(1.1 - shadow, 0, 0.6), canvas.ink(Ink((0.1, 0.1, 0.1), 0.05, 0.2)))

    figure = _Figure(canvas, facing, foot, unit)
    stride = rng.uniform(-0.42, 0.42)
    _add_legs(figure, who, stride)
    _add_torso(figure, who)
    swing = 0.9 * stride + rng.normal(0, 0.08)
    hand = _add_arms(figure, who, swing, rng.choice([0.15, 0.35, 1.2], 2, p=[0.5, 0.35, 0.15]))
    _add_head(figure, who)
    _add_bag(figure, who, hand)
    figure.draw()
    if rng.random() < 0.06:
        draw_occluder(canvas, rng)
    return develop(canvas, rng)
