"""Draw portraits from known factors.

The head turns only about the vertical axis, so rays can be cast in closed form. Every solid (skull, nose,
ear, neck, shell of hair) is a stack of ellipses, one per image row. Turning keeps every ellipse in its row,
so a pixel's depth is the root of one quadratic whose coefficients are constant along the row. Features are
painted in head coordinates at the point that the ray hits, so they move and foreshorten as the head turns.

Image coordinates: x to the right from the image's middle column, y down from its top row, z towards the
viewer, all in pixels. Head coordinates are image coordinates rotated back by the azimuth; y is the same.
Colours are linear light, the square of what is displayed. Planes are [N, h, w], images [N, 3, h, w].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

HEIGHT, WIDTH = 218, 178
CHUNK = 8  # faces drawn at a time: few enough for a core's cache, enough to amortise torch's calls


class Factor(NamedTuple):
    """One factor of variation, a column of the factor matrix: uniform over [low, high], or either of them."""

    name: str
    kind: str  # "continuous", "circular" or "binary"
    low: float
    high: float
    meaning: str


FACTORS = (
    Factor("azimuth", "continuous", -36, 36, "degrees the head is turned, positive to the image's right"),
    Factor("smile", "continuous", -1, 1, "-1 corners down, 0 neutral, 1 laughs"),
    Factor("skin", "continuous", 0, 1, "melanin: 0 lightest, 1 darkest"),
    Factor("hair_colour", "continuous", 0, 1, "black, brown, auburn, copper, blond, white"),
    Factor("hair_length", "continuous", 0, 1, "0 above the ears, 1 on the shoulders"),
    Factor("glasses", "binary", 0, 1, "1 wears glasses"),
    Factor("age", "continuous", 0, 1, "depth of the lines on forehead, cheeks and around the eyes"),
    Factor("background", "circular", 0, 360, "hue of the wall and the jumper, degrees"),
    Factor("light", "continuous", -50, 50, "degrees the light stands to the image's right"),
)


# --- Solids -----------------------------------------------------------------------------------------------
def _profile(y: Sequence[float], **knots: Sequence[float]) -> Tensor:
    """A stack of ellipses, [3, HEIGHT]: at every row the squared half width, depth / width, and z of the
    centre, by natural cubic splines through knots at rows y (of the half width itself, in pixels). Squared,
    because that goes through zero smoothly where a solid closes; it is negative beyond."""
    at, values = torch.tensor(y).double(), torch.tensor([*knots.values()]).double()
    values[0].square_()
    gap = at.diff()
    slope = values.diff() / gap
    system = torch.eye(len(y)).double()
    for k in range(1, len(y) - 1):
        system[k, k - 1 : k + 2] = torch.stack([gap[k - 1], 2 * (gap[k - 1] + gap[k]), gap[k]])
    bend = torch.linalg.solve(system, pad(6 * slope.diff(), (1, 1)).T).T  # second derivatives at the knots
    rows = torch.arange(HEIGHT).double() + 0.5
    i = (torch.searchsorted(at, rows) - 1).clamp(0, len(y) - 2)
    t = rows - at[i]
    inside = t.clamp(torch.zeros_like(t), gap[i])
    start = slope[:, i] - gap[i] * (2 * bend[:, i] + bend[:, i + 1]) / 6
    cubic = bend.diff()[:, i] / (6 * gap[i])
    value = values[:, i] + inside * (start + inside * (bend[:, i] / 2 + inside * cubic))
    beyond = (t - inside) * (start + inside * (bend[:, i] + 3 * inside * cubic))
    value[0] += beyond[0]  # beyond the knots the width is linear, the rest constant
    return value.float()


HEAD = _profile(
    y=[52, 62, 75, 98, 115, 130, 145, 157, 165, 170],
    width=[0, 28.9, 40, 46, 45.3, 42.3, 36.2, 27.5, 17.5, 0],
    depth=[1.09, 1.09, 1.09, 1.08, 1.06, 1.02, 0.98, 0.96, 0.96, 0.96],
    centre=[-4, -4, -4, -3, -1, 4, 11, 17, 23, 27],
)
NOSE = _profile(
    y=[98, 106, 117, 126, 133, 138, 141],
    width=[0, 4.2, 4.8, 7, 9, 7, 0],
    depth=[1.6, 1.6, 1.6, 1.5, 1.35, 1.35, 1.35],
    centre=[38, 40, 44, 47, 48, 47, 46],
)
EAR = _profile(
    y=[100, 107, 113, 122, 130],
    width=[0, 4.5, 5.4, 4.3, 0],
    depth=[1.8, 1.8, 1.8, 1.7, 1.6],
    centre=[-6, -6, -6, -5, -4],
)
HAIR = _profile(
    y=[44, 54, 68, 98, 125, 160, 190, 230],
    width=[0, 31, 44.5, 53.5, 54, 53, 56, 58],
    depth=[1.08, 1.08, 1.08, 1.08, 1, 0.9, 0.8, 0.7],
    centre=[-5, -5, -5, -5, -7, -10, -11, -12],
)
BODY = _profile(
    y=[130, 165, 178, 187, 197, 207, 225],
    width=[23, 23.5, 28, 42, 62, 75, 86],
    depth=[1, 1, 0.95, 0.75, 0.55, 0.48, 0.45],
    centre=[-8, -7, -6, -5, -4, -4, -4],
)
SPECTACLES = torch.tensor([65.0**2, 1, -10])[:, None].expand(3, HEIGHT)  # the cylinder on which the rims lie


class Box(NamedTuple):
    """A window of the image: everything is computed only where it is visible."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, canvas: Tensor) -> Tensor:
        return canvas[..., self.top : self.bottom, self.left : self.right]

    def within(self, outer: "Box") -> "Box":
        (top, bottom, left, right), down, along = self, outer.top, outer.left
        return Box(top - down, bottom - down, left - along, right - along)

    def grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """x [1, w] and y [h, 1] at the pixels' middles."""
        x = torch.arange(self.left, self.right, device=device) + (0.5 - WIDTH / 2)
        return x[None], (torch.arange(self.top, self.bottom, device=device) + 0.5)[:, None]


ALL_BOX, HAIR_BOX, BODY_BOX = Box(0, HEIGHT, 0, WIDTH), Box(40, 206, 27, 151), Box(140, HEIGHT, 0, WIDTH)
HEAD_BOX, NOSE_BOX, EAR_BOX = Box(48, 174, 27, 151), Box(96, 144, 27, 151), Box(98, 132, 31, 147)
EYES_BOX, MOUTH_BOX, GLASSES_BOX = Box(84, 128, 27, 151), Box(138, 168, 27, 151), Box(96, 130, 27, 151)


class Pose(NamedTuple):
    """Cosine and sine of the azimuth, [N, 1, 1]."""

    cos: Tensor
    sin: Tensor

    def across(self, x: Tensor, z: Tensor) -> Tensor:
        """Head coordinate to the face's side, of a point in view."""
        return x * self.cos - z * self.sin

    def ahead(self, x: Tensor, z: Tensor) -> Tensor:
        """Head coordinate towards the face's front, of a point in view."""
        return x * self.sin + z * self.cos


class Hit(NamedTuple):
    """Where the rays of a box meet a solid."""

    cover: Tensor  # the fraction of the pixel that the solid covers
    z: Tensor
    back: Tensor  # z of the far side
    normal: tuple[Tensor, Tensor, Tensor]  # unit length, in view coordinates
    centre: tuple[Tensor, Tensor, Tensor]  # x, z and half depth of the row's ellipse, [N, h, 1]


def _cast(profile: Tensor, pose: Pose, box: Box, aside: float = 0.0) -> Hit:
    """Meet a profile, [3, H] or [N, 3, H], moved aside across the head, with the rays of a box.

    In view, a row's ellipse is z = z0 + lean dx ± bulge root, with dx = x - x0 and root = sqrt(w2 - dx²)."""
    square, ratio, ahead = (p[..., box.top : box.bottom] for p in profile.to(pose.cos.device).unbind(-2))
    cos, sin = pose.cos[..., 0], pose.sin[..., 0]
    stretch = cos * cos + ratio * ratio * sin * sin
    x0, z0 = sin * ahead + cos * aside, cos * ahead - sin * aside
    lean, bulge = sin * cos * (ratio * ratio - 1) / stretch, ratio / stretch
    rows = torch.stack([square * stretch, x0, z0, lean, bulge])
    (slopes,) = torch.gradient(rows, dim=-1)
    (w2, x0, z0, lean, bulge), (dw2, dx0, dz0, dlean, dbulge) = rows[..., None], slopes[..., None]

    dx = box.grid(rows.device)[0] - x0
    h2 = w2 - dx * dx
    grow = dw2 / 2 + dx * dx0  # half of d(h2)/dy; half of d(h2)/dx is -dx
    cover = (h2 * (dx * dx + grow * grow).add_(1e-6).rsqrt_()).mul_(0.5).add_(0.5).clamp_(0, 1)
    root = h2.clamp_(min=0).sqrt_()
    z, reach = z0 + lean * dx, bulge * root
    nx = bulge * dx - lean * root
    ny = root * (lean * dx0 - dz0 - dlean * dx - dbulge * root) - bulge * grow
    scale = (nx * nx + ny * ny + root * root).add_(1e-6).rsqrt_()
    centre = (x0, z0, (ratio * square.clamp(min=1).sqrt())[..., None])
    return Hit(cover, z + reach, z - reach, (nx * scale, ny * scale, root * scale), centre)


# --- Paint and light --------------------------------------------------------------------------------------
RGB = tuple[int, int, int]  # as displayed

SKIN = ((255, 222, 200), (243, 196, 160), (217, 158, 115), (166, 107, 72), (122, 78, 56), (96, 62, 47))
HAIR_COLOURS = ((26, 23, 27), (72, 44, 30), (142, 64, 32), (190, 120, 56), (228, 186, 112), (228, 226, 222))
EYE_WHITE, IRIS, IRIS_RIM, PUPIL = (246, 244, 240), (116, 134, 96), (52, 60, 48), (22, 16, 18)
LASH, TEETH, THROAT = (40, 26, 26), (250, 247, 240), (92, 30, 34)
BLUSH, LIP = (255, 190, 184), (222, 150, 152)  # factors on the skin's colour
WHITE, LENS, FRAME = (255, 255, 255), (235, 245, 255), (34, 32, 40)
SHADE, LIT = (0.28, 0.23, 0.26), (1.12, 1.08, 1.02)  # the colours of shade and light, linear


def _linear(rgb: RGB, like: Tensor) -> Tensor:
    return (like.new_tensor(rgb) / 255).square()[:, None, None]


def _ramp(stops: Sequence[RGB], t: Tensor) -> Tensor:
    """Piecewise linear colour at t [N] in 0..1: [N, 3, 1, 1]. Linear as displayed: even steps to the eye."""
    table, at = t.new_tensor(stops) / 255, t * (len(stops) - 1)
    i = at.long().clamp(0, len(stops) - 2)
    return table[i].lerp(table[i + 1], (at - i)[:, None]).square()[..., None, None]


def _tint(hue: Tensor, saturation: float, value: float) -> Tensor:
    """Colour of a hue [N] in degrees: [N, 3, 1, 1], smooth around the circle."""
    wave = 0.5 + 0.5 * torch.deg2rad(hue[:, None] - hue.new_tensor([0, 120, 240])).cos()
    return (value * (1 - saturation * (1 - wave))).square()[..., None, None]


def _edge(distance: Tensor, soft: Tensor | float = 1.0) -> Tensor:
    """Coverage of a pixel at a signed distance, positive inside, from an edge this many pixels soft."""
    return (distance / soft).add_(0.5).clamp_(0, 1)


def _line(distance: Tensor, width: Tensor | float, soft: Tensor | float) -> Tensor:
    """Coverage by a stroke of this width around distance 0."""
    return _edge(width / 2 - distance.abs(), soft)


def _bump(d2: Tensor) -> Tensor:
    """A soft spot: 1 at squared distance 0, 0 from 1 on."""
    return (1 - d2).clamp_(min=0).square_()


def _over(canvas: Tensor, colour: Tensor | RGB, alpha: Tensor) -> None:
    """Paint a colour over a canvas in place, by the share alpha, a plane."""
    canvas.lerp_(colour if isinstance(colour, Tensor) else _linear(colour, canvas), alpha[:, None])


class Light(NamedTuple):
    """Unit vector towards the light; x and z are [N, 1, 1]."""

    x: Tensor
    y: float
    z: Tensor

    def diffuse(self, normal: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Lambert's law wrapped around the terminator, as skin scatters light: 0..1."""
        nx, ny, nz = normal
        return (nx * self.x + ny * self.y + nz * self.z).mul_(0.5).add_(0.5).square_()

    def gloss(self, normal: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Blinn's highlight with exponent 16: 0..1."""
        nx, ny, nz = normal
        scale = (2 + 2 * self.z).rsqrt()  # of the vector halfway between light and viewer
        half = nx * (self.x * scale) + ny * (self.y * scale) + nz * ((self.z + 1) * scale)
        return half.clamp_(min=0).square_().square_().square_().square_()


def _shade(albedo: Tensor, light: Tensor, gloss: Tensor | float = 0.0) -> Tensor:
    """Light an image in place by planes of diffuse light and white gloss."""
    for channel, shade, lit in zip(albedo.unbind(1), SHADE, LIT, strict=True):
        channel.mul_(light * (lit - shade) + shade).add_(gloss)
    return albedo


class Scene(NamedTuple):
    """The factors as the drawing needs them: plain ones [N, 1, 1], colours [N, 3, 1, 1]."""

    pose: Pose
    light: Light
    skin: Tensor
    hair: Tensor
    wall: Tensor
    vignette: Tensor
    jumper: Tensor
    smile: Tensor
    length: Tensor
    glasses: Tensor
    age: Tensor

    @classmethod
    def of(cls, factors: Tensor) -> "Scene":
        azimuth, smile, skin, hair, length, glasses, age, hue, light = factors.unbind(1)
        turn, side = (torch.deg2rad(angle)[:, None, None] for angle in (azimuth, light))
        return cls(
            Pose(turn.cos(), turn.sin()),
            Light(0.88 * side.sin(), -0.475, 0.88 * side.cos()),
            _ramp(SKIN, skin),
            _ramp(HAIR_COLOURS, hair),
            _tint(hue, 0.28, 0.97),
            _tint(hue, 0.46, 0.80),
            _tint(hue, 0.55, 0.62),
            *(f[:, None, None] for f in (smile, length, glasses, age)),
        )


# --- The face ---------------------------------------------------------------------------------------------
class Face(NamedTuple):
    """The skin to paint on, and where on the head each of its pixels is."""

    albedo: Tensor
    x: Tensor
    y: Tensor  # [h, 1]
    soft: Tensor  # head pixels per image pixel: an edge is softer where the surface turns away

    def window(self, box: Box) -> "Face":
        inner = box.within(HEAD_BOX)
        y = self.y[inner.top : inner.bottom]
        return Face(inner.of(self.albedo), inner.of(self.x), y, inner.of(self.soft))


def _paint_skin(face: Face, scene: Scene) -> None:
    """Blush, the shadows that give the face relief, nostrils, and the lines of age."""
    _, x, y, _ = face
    ax, age = x.abs(), scene.age
    blush = _bump(((ax - 25) / 17).square() + ((y - 134) / 13).square())
    _over(face.albedo, scene.skin * _linear(BLUSH, x), (0.5 - 0.3 * age) * blush)
    dark = (0.28 + 0.15 * age) * _bump(((ax - 18) / 17).square() + ((y - 108) / 14).square())  # eye sockets
    dark += 0.30 * _bump((x / 13).square() + ((y - 143) / 5).square())  # under the nose
    dark += 0.22 * _bump((x / 14).square() + ((y - 163 - 2.5 * scene.smile) / 4).square())  # under the lip
    dark += 0.75 * _bump(((ax - 4.2) / 3.2).square() + ((y - 138.3) / 2.2).square())  # nostrils
    dark += 0.30 * age * _bump(((ax - 31) / 11).square() + ((y - 143) / 19).square())  # hollow cheeks
    for row, reach in ((77.5, 26), (84, 31), (90, 25)):  # forehead
        crease = y - row - 1.5 * (1 - (x / reach).square())
        dark += 0.55 * age * _bump((crease / 2.7).square()) * _bump((x / reach).square())
    t = (y - 136) / 22  # from the nose's wing to beside the mouth
    fold = ax - 12 - (8.5 + 3 * scene.smile) * t
    dark += (0.08 + 0.55 * age) * _bump((fold / 3.2).square()) * _bump(0.8 * (2 * t - 1).square())
    bag = y - 124 - 2.5 * (1 - ((ax - 19) / 11).square())
    dark += 0.55 * age * _bump((bag / 2.6).square()) * _bump(((ax - 19) / 13).square())
    for slant in (-0.45, 0.0, 0.45):  # crow's feet
        ray = y - 113 - slant * (ax - 30)
        dark += 0.5 * age * _bump((ray / 2.0).square()) * _bump(((ax - 36) / 6.5).square())
    dark.clamp_(max=0.9)
    red, *others = face.albedo.unbind(1)
    red.mul_(1 - dark)
    for channel in others:  # shaded skin is redder
        channel.mul_((1 - dark) * (1 - 0.25 * dark))


def _paint_eyes(face: Face, scene: Scene) -> None:
    """Brows, eyes and lashes, both sides at once: e grows outwards from the middle of either eye."""
    canvas, x, y, soft = face
    e = x.abs() - 19
    arch = 1 - (e / 11).square()
    steep = (1 + (e * 0.13).square()).rsqrt()  # turns heights above a lid into distances
    upper = (y - 113 + 8.0 * arch + 0.07 * e) * steep
    lower = (113 + (6.0 - 1.8 * scene.smile) * arch - 0.07 * e - y) * steep
    eye, corner = _edge(torch.minimum(upper, lower), soft), _edge(6 * arch, soft)
    r = (e.square() + (y - 111).square()).sqrt()
    glint = ((x - 19 * x.sign() - 3 * scene.light.x).square() + (y - 108.5).square()).sqrt()
    for colour, alpha in (
        (EYE_WHITE, eye),
        (IRIS_RIM, eye * _edge(6.9 - r, soft)),
        (IRIS, eye * _edge(5.7 - r, soft)),
        (PUPIL, eye * _edge(3.1 - r, soft)),
        (LASH, eye * 0.4 * (1 - upper / 6).clamp_(0, 1)),  # the upper lid's shadow
        (WHITE, eye * _edge(1.9 - glint, soft)),
        (LASH, _line(upper + 0.4, 2.3, soft) * _edge(6 * arch + 1, soft)),
        (LASH, 0.35 * _line(lower, 1.2, soft) * corner),
        (LASH, 0.30 * _line(upper + 4.5, 1.6, soft) * corner),  # the lid's fold
    ):
        _over(canvas, colour, alpha)
    t = (e / 14).clamp_(-1, 1)
    brow = y - 94.5 + (1.2 + 1.5 * t) * scene.smile + 3.0 * (1 - (t - 0.15).square())
    thick = (4.8 - 1.4 * t) * (1 - t.square().square())
    _over(canvas, 0.55 * scene.hair, 0.9 * _line(brow, thick, 1.4 * soft) * (t.abs() < 1))


def _paint_mouth(face: Face, scene: Scene) -> None:
    """Lips around a line that bends, widens and opens with the smile."""
    canvas, x, y, soft = face
    smile = scene.smile
    arch = 1 - (x / (15.5 + 4.5 * smile)).square()
    line = 151 + 6.5 * smile * arch - 3.5 * smile
    gape = 7.5 * (smile + 0.2).clamp(min=0).square()
    upper = y - line + 4.0 * arch - 1.2 * _bump((x / 4).square())
    lips = _edge(torch.minimum(upper, line + (gape + 5.0) * arch - y), soft) * _edge(5 * arch + 0.5, soft)
    mouth = _edge(torch.minimum(y - line, line + gape * arch - y), soft) * _edge(5 * arch, soft)
    teeth = mouth * (gape - 1).clamp(0, 1) * _edge(line + 0.62 * gape * arch - y, soft)
    _over(canvas, scene.skin * _linear(LIP, x), 0.9 * lips)
    _over(canvas, THROAT, mouth)
    _over(canvas, TEETH, teeth)
    _over(canvas, THROAT, 0.8 * _line(y - line, 1.5, soft) * _edge(5 * arch + 1.5, soft))


def _join_nose(head: Hit, pose: Pose) -> None:
    """Grow the nose out of the face: the smooth maximum of two depths, and the normals mixed alike."""
    nose, inner = _cast(NOSE, pose, NOSE_BOX), NOSE_BOX.within(HEAD_BOX)
    z, cover = inner.of(head.z), inner.of(head.cover)
    mix = (0.5 + (nose.z - z) / 10).clamp_(0, 1).mul_(nose.cover)
    z.lerp_(nose.z, mix).add_(5 * mix * (1 - mix))
    cover.copy_(torch.maximum(cover, mix))
    for of_head, of_nose in zip(head.normal, nose.normal, strict=True):
        inner.of(of_head).lerp_(of_nose, mix)


def _draw_head(canvas: Tensor, scene: Scene) -> Hit:
    head = _cast(HEAD, scene.pose, HEAD_BOX)
    # The head is narrower than the hair around it: the same edge lies further back on it.
    around = 0.88 * _around(head, head.z, scene.pose, HEAD_BOX)
    _join_nose(head, scene.pose)
    x, y = HEAD_BOX.grid(canvas.device)
    albedo = scene.skin.expand(-1, -1, *head.z.shape[1:]).clone()
    face = Face(albedo, scene.pose.across(x, head.z), y, 1 / head.normal[2].clamp(min=0.3))
    _paint_skin(face, scene)
    _paint_eyes(face.window(EYES_BOX), scene)
    _paint_mouth(face.window(MOUTH_BOX), scene)

    inside = _hairline(around, y, scene.length)
    _over(albedo, 0.6 * scene.hair, _edge(inside, 3.0) * ((128 - y) / 12).clamp(0, 1))
    shadow = 0.5 * (1 + inside / 11).clamp(0, 1) * ((170 - y) / 20).clamp(0, 1)  # of the hair
    _shade(albedo, scene.light.diffuse(head.normal) * (1 - shadow), 0.08 * scene.light.gloss(head.normal))
    _over(HEAD_BOX.of(canvas), albedo, head.cover)
    return head


def _seen(z: Tensor, cover: Tensor, head: Hit, box: Box) -> Tensor:
    """The visible share of a thing at depth z with coverage `cover`: the head hides the rest."""
    inner = box.within(HEAD_BOX)
    return cover * (1 - inner.of(head.cover) * _edge(inner.of(head.z) - z, 3.0))


def _draw_ear(canvas: Tensor, scene: Scene, head: Hit, aside: float) -> None:
    ear = _cast(EAR, scene.pose, EAR_BOX, aside)
    x, y = EAR_BOX.grid(canvas.device)
    hollow = _bump(((scene.pose.ahead(x, ear.z) + 4) / 5.5).square() + ((y - 115) / 8).square())
    albedo = scene.skin.expand(-1, -1, *ear.z.shape[1:]).clone()
    _shade(albedo, scene.light.diffuse(ear.normal) * (0.9 - 0.45 * hollow))
    _over(EAR_BOX.of(canvas), albedo, _seen(ear.z, ear.cover, head, EAR_BOX))


def _draw_glasses(canvas: Tensor, scene: Scene, head: Hit) -> None:
    """Rims on a shallow cylinder before the eyes, and straight arms from hinge to ear."""
    front, pose = _cast(SPECTACLES, scene.pose, GLASSES_BOX), scene.pose
    x, y = GLASSES_BOX.grid(canvas.device)
    across, soft = pose.across(x, front.z), 1 / front.normal[2].clamp(min=0.3)
    e = across.abs() - 19
    rim = 12.5 - ((e.abs() - 1.5).clamp_(min=0).square() + (y - 113).square()).sqrt()
    bridge = torch.minimum(1.4 - (y - 109 - (across / 6).square()).abs(), 6.5 - across.abs())
    frame = torch.maximum(_line(rim, 3.2, soft), _edge(bridge, soft))
    frame = _seen(front.z, frame * front.cover, head, GLASSES_BOX)
    for side in (-1, 1):
        ends = ((33.5 * side, 45.5), (47.5 * side, -6.0))  # across and ahead, of hinge and ear
        (x1, z1), (x2, z2) = ((a * pose.cos + b * pose.sin, b * pose.cos - a * pose.sin) for a, b in ends)
        run = x2 - x1
        z = z1 + (z2 - z1) * ((x - x1) * run / (run * run + 1)).clamp(0, 1)
        arm = torch.minimum(1.6 - (y - 109).abs(), run.abs() / 2 + 1.2 - (x - (x1 + x2) / 2).abs())
        frame = torch.maximum(frame, _seen(z, _edge(arm), head, GLASSES_BOX))
    lens = _seen(front.z, _edge(rim, soft) * front.cover, head, GLASSES_BOX)
    streak = across - 19 * across.sign() - scene.light.x * (8 - 0.9 * (y - 113))
    window = GLASSES_BOX.of(canvas)
    _over(window, LENS, scene.glasses * lens * (0.05 + 0.15 * _bump((streak / 4).square())))
    _over(window, FRAME, scene.glasses * frame)


# --- Hair -------------------------------------------------------------------------------------------------
def _around(hit: Hit, z: Tensor, pose: Pose, box: Box) -> Tensor:
    """A point's angle around its row's ellipse, as the unit circle's chord: 0 front, 1.41 side, 2 back."""
    x0, z0, depth = hit.centre
    ahead = pose.ahead(box.grid(z.device)[0] - x0, z - z0)
    return (2 - 2 * (ahead / depth).clamp_(-1, 1)).sqrt_()


def _hairline(around: Tensor, y: Tensor, length: Tensor) -> Tensor:
    """Signed distance in pixels, positive in the hair, to its edge: parted in the middle, swept to the sides,
    falling forward over the shoulders, and as long as it is."""
    a2 = around * around
    a6 = a2 * a2 * a2
    front = 60 + 18 * around + 8 * a2 + 110 * a6 * a2 - y
    slope = (18 + 16 * around + 880 * a6 * around).div_(52)  # the head is about 52 pixels deep
    locks = 52 * (around - 1.1) + 0.45 * (y - 150)
    edge = torch.maximum(front * (1 + slope * slope).rsqrt_(), locks)
    sideburn = (1 - 3 * length).clamp(min=0) * _bump(((a2 - 1.55) / 0.5).square())
    end = 98 + 86 * length + 8 * (a2 - 1.6) + 12 * sideburn - y
    return torch.minimum(edge, end) - (16 - (edge - end).abs()).clamp_(min=0).square_().div_(64)  # rounded


def _shell(length: Tensor) -> Tensor:
    """[N, 3, H]: the hair's profile, drawn in to the neck towards its end."""
    y = torch.arange(HEIGHT, device=length.device) + 0.5
    reach = 70 - 40 * length[:, 0]
    t = ((y - 136 - 84 * length[:, 0]) / reach + 1).clamp(0, 1)
    width, depth, centre = HAIR.to(y.device)[:, None].expand(-1, len(t), -1)
    return torch.stack([width * (1 - 0.8 * t * t), depth, centre], 1)


class Hair(NamedTuple):
    """The shell of hair, and its signed distances to the hair's edge, on the near and the far side."""

    shell: Hit
    around: Tensor
    near: Tensor
    far: Tensor

    @classmethod
    def of(cls, scene: Scene) -> "Hair":
        shell = _cast(_shell(scene.length), scene.pose, HAIR_BOX)
        _, y = HAIR_BOX.grid(shell.z.device)
        near, far = (_around(shell, z, scene.pose, HAIR_BOX) for z in (shell.z, shell.back))
        return cls(shell, near, _hairline(near, y, scene.length), _hairline(far, y, scene.length))


def _draw_hair_behind(canvas: Tensor, scene: Scene, hair: Hair) -> None:
    """The inside of the far side, where the near side is open. (Under the near side's soft silhouette it
    would show as a dark rim.)"""
    alpha = hair.shell.cover * _edge(hair.far, 2.0) * (1 - _edge(hair.near - 5, 2.0))
    _over(HAIR_BOX.of(canvas), 0.3 * scene.hair, alpha)


def _draw_hair(canvas: Tensor, scene: Scene, hair: Hair) -> None:
    _, y = HAIR_BOX.grid(canvas.device)
    strands = 1 + 0.07 * (0.75 * hair.near).sin() + 0.07 * (31 * hair.around + 0.04 * y).sin()
    relief = 0.55 + 0.45 * (hair.near / 7).clamp(0, 1)  # hair turns in at its edge
    parting = 1 - 0.45 * _bump((hair.around / 0.09).square())
    gloss = scene.light.gloss(hair.shell.normal) * strands
    albedo = scene.hair * (1 + 0.45 * gloss)[:, None]
    _shade(albedo, scene.light.diffuse(hair.shell.normal) * strands * relief * parting, 0.05 * gloss)
    _over(HAIR_BOX.of(canvas), albedo, hair.shell.cover * _edge(hair.near, 2.0))


# --- The picture ------------------------------------------------------------------------------------------
def _wall(scene: Scene) -> Tensor:
    x, y = ALL_BOX.grid(scene.wall.device)
    return scene.vignette.lerp(scene.wall, _bump((x / 190).square() + ((y - 80) / 230).square()))


def _draw_body(canvas: Tensor, scene: Scene) -> None:
    """Neck and shoulders in a jumper. They do not turn."""
    still = torch.zeros_like(scene.pose.sin)
    body = _cast(BODY, Pose(still + 1, still), BODY_BOX)
    x, y = BODY_BOX.grid(canvas.device)
    albedo = scene.skin.expand(-1, -1, *body.z.shape[1:]).clone()
    _over(albedo, scene.jumper, _edge(y - 186 - 5 * _bump((x / 34).square())).expand_as(body.z))
    shadow = 0.35 + 0.65 * ((y - 150) / 40 + (x / 60).square()).clamp(0, 1)  # of the chin
    _over(BODY_BOX.of(canvas), _shade(albedo, scene.light.diffuse(body.normal) * shadow), body.cover)


def _draw(factors: Tensor) -> Tensor:
    """From back to front: [N, 3, H, W] uint8, for a handful of faces."""
    scene = Scene.of(factors)
    canvas, hair = _wall(scene), Hair.of(scene)
    _draw_hair_behind(canvas, scene, hair)
    _draw_body(canvas, scene)
    head = _draw_head(canvas, scene)
    for aside in (-45, 45):
        _draw_ear(canvas, scene, head, aside)
    _draw_glasses(canvas, scene, head)
    _draw_hair(canvas, scene, hair)
    return canvas.clamp_(0, 1).sqrt_().mul_(255).add_(0.5).to(torch.uint8)


def landmarks(factors: Tensor) -> Tensor:
    """Where eyes, nose and mouth are, as in CelebA's list: factors [N, K] -> pixels x, y, int64 [N, 10].

    The order is left eye, right eye, nose, left and right corner of the mouth, as seen in the image.
    """
    scene = Scene.of(factors.float())
    cos, sin, smile = scene.pose.cos[:, 0, 0], scene.pose.sin[:, 0, 0], scene.smile[:, 0, 0]
    still = torch.zeros_like(smile)
    across = torch.stack([still - 19, still + 19, still, -15.5 - 4.5 * smile, 15.5 + 4.5 * smile], 1)
    down = torch.stack([still + 111, still + 111, still + 133, 151 - 3.5 * smile, 151 - 3.5 * smile], 1)
    row = down.long()
    profile = torch.stack([HEAD, HEAD, NOSE, HEAD, HEAD]).to(factors.device)  # the solids that they lie on
    square, ratio, centre = (profile[torch.arange(5), i, row] for i in range(3))
    ahead = centre + ratio * (square - across**2).clamp(min=0).sqrt()
    x = WIDTH / 2 + across * cos[:, None] + ahead * sin[:, None]
    return torch.stack([x, down], 2).flatten(1).long()


def boxes(factors: Tensor) -> Tensor:
    """The box around each head without hair: factors [N, K] -> left, top, width, height, int64 [N, 4]."""
    pose = Scene.of(factors.float()).pose
    rows = (HEAD[0] > 0).nonzero().flatten()
    square, ratio, centre = HEAD[:, rows].to(factors.device)
    cos, sin = pose.cos[:, 0], pose.sin[:, 0]
    half = (square * (cos**2 + (ratio * sin) ** 2)).sqrt()
    left, right = (WIDTH / 2 + sin * centre - half).amin(1), (WIDTH / 2 + sin * centre + half).amax(1)
    top, height = torch.full_like(left, float(rows[0])), torch.full_like(left, float(len(rows)))
    return torch.stack([left.floor(), top, right.ceil() - left.floor(), height], 1).long()


@torch.no_grad()
def render(factors: Tensor) -> Tensor:
    """Draw faces: factors [N, K], columns and ranges as in FACTORS -> uint8 [N, 218, 178, 3], same device."""
    return torch.cat([_draw(chunk) for chunk in factors.float().split(CHUNK)]).permute(0, 2, 3, 1)
