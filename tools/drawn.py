"""Pictures that no camera took, drawn by formula a batch at a time, on a GPU or a CPU: grain, waves, cells and rings;
shapes with edges, ridges and light, lone or in rows and circles. The built-in teacher learns to see on them.
"""

import math
from copy import copy

import torch

SHAPES = 28  # at most, one over another
CELLS = 40
LARGEST, SMALLEST = 64.0, 2.5  # pixels, half the width of a shape

Tensor = torch.Tensor


class Dice:
    """Random numbers for `count` pictures: one seed, one stream, on the device that draws."""

    def __init__(self, seed: int, count: int, device: torch.device) -> None:
        self.stream = torch.Generator(device).manual_seed(seed)
        self.count, self.device = count, device

    def of(self, count: int) -> "Dice":
        """For so many of the pictures, out of the same stream."""
        fewer = copy(self)
        fewer.count = count
        return fewer

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """count×shape."""
        return torch.rand(self.count, *shape, generator=self.stream, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, generator=self.stream, device=self.device)

    def happens(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(0, 1, *shape) < probability


def draw(seed: int, count: int, size: int, device: torch.device) -> Tensor:
    """uint8 count×3×size×size; the same seed, count and size are the same pictures on the same device."""
    dice = Dice(seed, count, device)
    ground, filling = _coloured(_fields(dice, size), dice), _coloured(_fields(dice, size), dice)
    picture = _shapes(ground, filling, dice)
    return (picture.clip(0, 1) * 255).round().byte()


def _fields(dice: Dice, size: int) -> Tensor:
    """count×size×size, mean 0 and deviation 1: each one of four kinds, bent by a cloud, bare, stepped or folded."""
    cloud = _cloud(dice, size)
    y, x = _plane(dice, size)
    bend = dice.uniform(0, 1, 1, 1) ** 3 * 12
    y, x = y + bend * cloud, x + bend * cloud.roll(1, 0)
    kind = dice.uniform(0, 4).floor()
    field = cloud.clone()
    for number, make in enumerate((_waves, _cells, _rings), 1):
        rows = (kind == number).nonzero()[:, 0]
        field[rows] = make(x[rows], y[rows], dice.of(len(rows)))
    field = _standard(field)
    form, strength = dice.uniform(0, 4, 1, 1).floor(), dice.uniform(1, 6, 1, 1)
    field = torch.where(form == 1, torch.tanh(strength * 2 * (field - dice.uniform(-1, 1, 1, 1))), field)
    field = torch.where(form == 2, torch.sin(strength * field), field)
    return _standard(torch.where(form == 3, field.abs(), field))


def _cloud(dice: Dice, size: int) -> Tensor:
    """Noise with a power-law spectrum, stretched along one direction: cast, brushed and grained surfaces."""
    exponent, angle = dice.uniform(0.5, 2.2, 1, 1), dice.uniform(0, math.pi, 1, 1)
    stretch = 1 + dice.uniform(0, 1, 1, 1) ** 2 * 7
    fy = torch.fft.fftfreq(size, device=dice.device)[:, None]
    fx = torch.fft.rfftfreq(size, device=dice.device)
    u, v = fx * angle.cos() + fy * angle.sin(), fy * angle.cos() - fx * angle.sin()
    spectrum = (torch.hypot(u * stretch, v) + 1 / size) ** -exponent
    noise = torch.complex(dice.normal(size, size // 2 + 1), dice.normal(size, size // 2 + 1))
    return _standard(torch.fft.irfft2(noise * spectrum, s=(size, size)))


def _waves(x: Tensor, y: Tensor, dice: Dice) -> Tensor:
    """Stripes, grids, moiré."""
    field = torch.zeros_like(x)
    for _ in range(3):
        angle, turns = dice.uniform(0, math.pi, 1, 1), 2 * math.pi / _period(dice, 1, 1)
        phase, weight = dice.uniform(0, 2 * math.pi, 1, 1), dice.uniform(-0.6, 1, 1, 1).clip(0)
        field += weight * torch.sin((x * angle.cos() + y * angle.sin()) * turns + phase)
    return field + 1e-3 * x


def _cells(x: Tensor, y: Tensor, dice: Dice) -> Tensor:
    """Distance to scattered points, or to the border between two, or a level for each: dots, grains, cracks."""
    size = x.shape[-1]
    scale = dice.uniform(0.5, 1.6, 1, 1)
    nearest = torch.full_like(x, 1e9)
    second, level = nearest.clone(), torch.zeros_like(x)
    for _ in range(CELLS):
        px, py = dice.uniform(0, size, 1, 1), dice.uniform(0, size, 1, 1)
        # drawn once more on each side: no place is far from all of them
        dx, dy = ((x - px + size / 2) % size - size / 2), ((y - py + size / 2) % size - size / 2)
        distance = torch.hypot(dx, dy * scale)
        closer = distance < nearest
        second = torch.where(closer, nearest, torch.minimum(second, distance))
        level = torch.where(closer, dice.normal(1, 1).expand_as(level), level)
        nearest = torch.minimum(nearest, distance)
    style = dice.uniform(0, 3, 1, 1).floor()
    border = (second - nearest).clip(max=12)
    return torch.where(style == 0, nearest, torch.where(style == 1, border, level))


def _rings(x: Tensor, y: Tensor, dice: Dice) -> Tensor:
    """Around a point: turned and knurled surfaces, gears seen from above."""
    x, y = x - dice.uniform(-20, 180, 1, 1), y - dice.uniform(-20, 180, 1, 1)
    teeth = dice.uniform(0, 24, 1, 1).round()
    return torch.sin(torch.hypot(x, y) * 2 * math.pi / _period(dice, 1, 1) + torch.atan2(y, x) * teeth)


def _shapes(picture: Tensor, filling: Tensor, dice: Dice) -> Tensor:
    """Shapes laid on the pictures, the large ones first. Half of the pictures repeat one shape, in a row or around a
    circle or anywhere, the others have a new one each time."""
    size = picture.shape[-1]
    y, x = _plane(dice, size)
    how_many = dice.uniform(0, 1) ** 1.5 * (SHAPES + 1)
    repeats = dice.happens(0.5)
    sizes = LARGEST * (SMALLEST / LARGEST) ** dice.uniform(0, 1, SHAPES)
    sizes = torch.where(repeats[:, None], sizes[:, :1], sizes.sort(1, descending=True).values)
    start, step = dice.uniform(0, size, 2), dice.uniform(-30, 30, 2)
    radius, row, circle = dice.uniform(15, 80), dice.happens(0.35), dice.happens(0.3)
    first = _settings(dice)
    for number in range(SHAPES):
        anywhere = dice.uniform(0, size, 2)
        around = start + radius[:, None] * _circle(dice.uniform(-0.03, 0.03) + number * 2 * math.pi / 12)
        centre = torch.where(row[:, None], start + number * step, torch.where(circle[:, None], around, anywhere))
        centre = torch.where(repeats[:, None], centre, anywhere)[:, :, None, None]
        settings = torch.where(repeats[:, None], first, _settings(dice))
        rows = (number < how_many).nonzero()[:, 0]
        alpha, painted = _shape(
            x[rows] - centre[rows, 0],
            y[rows] - centre[rows, 1],
            sizes[rows, number, None, None],
            settings[rows],
            filling.roll(number, 0)[rows],
        )
        picture[rows] += alpha[:, None] * (painted - picture[rows])
    return picture


def _settings(dice: Dice) -> Tensor:
    """count×17: what a shape looks like, apart from its place and size."""
    numbers = [
        dice.uniform(0, 2 * math.pi),  # turned
        1 + dice.uniform(0, 1) ** 3 * 14,  # long
        dice.uniform(0, 3).floor(),  # super-ellipse, polygon or flower
        2 ** dice.uniform(-0.5, 3),  # how square a super-ellipse is
        dice.uniform(3, 9).floor(),  # corners or petals
        dice.uniform(0, 0.5),  # how deep the petals are
        dice.uniform(-0.4, 0.85).clip(0),  # the hole in it, as a part of its size
        dice.uniform(-1, 1).clip(0),  # how round it is lit
        dice.uniform(0, 2 * math.pi),  # where the light comes from
        dice.uniform(-0.6, 0.6).clip(0),  # ridges: strength,
        _period(dice) / 2 + 2,  # distance
        dice.uniform(-0.7, 0.7),  # and slant
        dice.uniform(-1, 1).clip(0),  # outline: strength
        dice.uniform(-0.3, 1).clip(0),  # how much of the filling shows
    ]
    return torch.cat([torch.stack(numbers, 1), _colour(dice)[:, :, 0, 0]], 1)


def _shape(x: Tensor, y: Tensor, size: Tensor, settings: Tensor, filling: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage count×h×w and colour count×3×h×w of one shape for each picture, its centre at (0, 0)."""
    numbers, colour = settings[:, :-3, None, None].unbind(1), settings[:, -3:, None, None]
    turn, long, kind, power, corners, petals, hole, lit, light, ridges, period, slant, outline, shown = numbers
    across = size / long.sqrt()
    u, v = (x * turn.cos() + y * turn.sin()) / (across * long), (y * turn.cos() - x * turn.sin()) / across
    angle, reach = torch.atan2(v, u), torch.hypot(u, v)
    sector = math.pi / corners
    polygon = reach * torch.cos((angle % (2 * sector)) - sector) / torch.cos(sector)
    ellipse = (u.abs().clip(1e-4) ** power + v.abs().clip(1e-4) ** power).clip(max=1e6) ** (1 / power)
    flower = reach / (1 + petals * torch.cos(angle * corners))
    depth = torch.where(kind == 0, ellipse, torch.where(kind == 1, polygon, flower))
    pixels = across.clip(min=1.5)
    inside = ((1 - depth) * pixels + 0.5).clip(0, 1)
    inside = torch.where(hole > 0, inside * ((depth - hole) * pixels + 0.5).clip(0, 1), inside)
    shade = 1 + lit * (0.7 * (u * light.cos() + v * light.sin()) - 0.3 * depth).clip(-0.9, 0.9)
    shade = shade + ridges * torch.sin(2 * math.pi * (u * across * long + slant * v * across) / period)
    shade = shade * (1 - 0.8 * outline * torch.exp(-(((1 - depth) * pixels / 1.5) ** 2)))
    shown = shown[:, None]
    return inside, (filling * shown + colour * (1 - shown)) * shade[:, None]


def _coloured(field: Tensor, dice: Dice) -> Tensor:
    """count×3×h×w from 0 to 1: from one colour over a second to a third."""
    level = (field / 4 + 0.5).clip(0, 1)[:, None]
    dark, middle, bright = _colour(dice), _colour(dice), _colour(dice)
    middle = torch.where(dice.happens(0.6, 1, 1, 1), (dark + bright) / 2, middle)
    low, high = (2 * level).clip(max=1), (2 * level - 1).clip(min=0)
    return dark + (middle - dark) * low + (bright - middle) * high


def _colour(dice: Dice) -> Tensor:
    """count×3×1×1; half of them grey or nearly so, as machined parts are."""
    grey, hue = dice.uniform(0.05, 0.95, 1, 1, 1), dice.uniform(0, 1, 3, 1, 1)
    saturation = torch.where(dice.happens(0.5, 1, 1, 1), 0.1, 0.9) * dice.uniform(0, 1, 1, 1, 1)
    return grey + (hue - grey) * saturation


def _period(dice: Dice, *shape: int) -> Tensor:
    """4 to 40 pixels, each octave as often as another."""
    return 4 * 10 ** dice.uniform(0, 1, *shape)


def _circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _plane(dice: Dice, size: int) -> tuple[Tensor, Tensor]:
    ramp = torch.arange(size, device=dice.device, dtype=torch.float32)
    return ramp[:, None].expand(dice.count, size, size), ramp.expand(dice.count, size, size)


def _standard(field: Tensor) -> Tensor:
    return (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True).clip(min=1e-4)
