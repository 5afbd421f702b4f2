"""Render scenes to pixels: flat shapes with anti-aliased edges on a plain background, on any device.

    videos = render([parse("a red circle moving left")], seed=0)          # (1, 17, 3, 64, 64)

and for a bank of training clips, without a list of scenes:

    specs, layout = sample_layouts(4096, "train", generator=torch.Generator("cuda"))
    videos, prompts = render_layout(layout), [scene.prompt() for scene in specs.scenes()]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .grammar import SHAPES, Scene
from .layout import DURATION, UNITS, Layout, lay_out
from .specs import SceneSpecs

#: RGB in [0, 1] of `COLORS` and of `BACKGROUNDS`.
COLOR_RGB = torch.tensor(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.75, 0.15],
        [0.15, 0.25, 0.95],
        [0.95, 0.85, 0.10],
        [0.70, 0.15, 0.85],
        [0.10, 0.85, 0.90],
    ]
)
BACKGROUND_RGB = torch.tensor([[0.02, 0.02, 0.02], [0.5, 0.5, 0.5], [0.98, 0.98, 0.98]])

# a shape has the area of the circle with its radius
_SQUARE = math.sqrt(math.pi) / 2  # half a side
_TRIANGLE = math.sqrt(math.pi / (3 * math.sqrt(3)))  # radius of the inscribed circle
_CROSS = 1.189  # half the length of an arm, three times half its width
_ROWS = 8  # clips drawn at once on a CPU, for its caches


def coverage(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return each pixel's coverage by one shape, in [0, 1]; it is linear across the edge, over one pixel.

    Args:
        shape: one of `SHAPES`.
        dx: pixel center minus shape center in x, in units, broadcastable, usually (..., 1, W).
        dy: the same in y, usually (..., H, 1).
        radius: radius of the circle of equal area, in units, broadcastable.
        scale: pixels per unit.
    """

    def inside(distance):
        return (0.5 - distance * scale).clamp_(0, 1)

    ax, ay = dx.abs(), dy.abs()
    if shape == "circle":
        return inside((dx * dx + dy * dy + 1e-6).sqrt_().sub_(radius))
    if shape == "square":
        return torch.minimum(inside(ax - _SQUARE * radius), inside(ay - _SQUARE * radius))
    if shape == "triangle":
        inner = _TRIANGLE * radius
        return torch.minimum(inside(dy - inner), inside((math.sqrt(3) / 2 * ax) + (-0.5 * dy - inner)))
    long, short = _CROSS * radius, _CROSS * radius / 3
    across = torch.minimum(inside(ax - long), inside(ay - short))
    return torch.maximum(across, torch.minimum(inside(ax - short), inside(ay - long)))


def render(
    scenes: Sequence[Scene],
    seed: int = 0,
    size: int = 64,
    num_frames: int = 17,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Render one clip per scene.

    Args:
        scenes: B scenes.
        seed: seed of unnamed attributes and positions; the result also depends on B and the device.
        size: height and width in pixels, a multiple of 32.
        num_frames: frames per clip, at least 4. It does not change the motion over the whole clip.
        device: the device to render on.

    Returns:
        (B, num_frames, 3, size, size) float32 in [0, 1].

    Raises:
        ValueError: there are no scenes, size or num_frames is not allowed, or a scene has no legal layout.
    """
    if not len(scenes):
        raise ValueError("scenes is empty; allowed: one Scene or more, such as [parse('a red circle')].")
    generator = torch.Generator(device).manual_seed(seed)
    return render_layout(lay_out(SceneSpecs.from_scenes(scenes, device), generator), size, num_frames)


def render_layout(layout: Layout, size: int = 64, num_frames: int = 17) -> torch.Tensor:
    """Render N layouts on their device: (N, num_frames, 3, size, size) float32 in [0, 1].

    Raises:
        ValueError: size or num_frames is not allowed.
    """
    if size < UNITS or size % UNITS:
        raise ValueError(f"size={size!r}; allowed: multiples of {UNITS} from {UNITS}, such as 64.")
    if num_frames < 4:
        raise ValueError(f"num_frames={num_frames!r}; allowed: 4 or more, such as 17.")
    device = layout.background.device
    videos = BACKGROUND_RGB.to(device)[layout.background][:, None, :, None, None]
    videos = videos.repeat(1, num_frames, 1, size, size)
    rows = _ROWS if device.type == "cpu" else len(layout)
    for first in range(0, len(layout), rows):
        _draw(videos[first : first + rows], layout[first : first + rows])
    return videos


def _draw(videos: torch.Tensor, layout: Layout) -> None:
    """Add the objects in place. Legal objects never share a pixel, so their order does not matter."""
    num_frames, size, device = videos.shape[1], videos.shape[-1], videos.device
    scale = size / UNITS
    pixel = (torch.arange(size, device=device) + 0.5) / scale - 0.5
    t = torch.linspace(0, DURATION, num_frames, device=device)
    for index, shape in enumerate(SHAPES):
        clip, slot = (layout.present & (layout.shape == index)).nonzero(as_tuple=True)
        if not len(clip):
            continue
        centre = layout.start[clip, slot][:, None] + layout.velocity[clip, slot][:, None] * t[:, None]
        growth = 1 + (layout.growth[clip, slot][:, None] - 1) * t / DURATION
        radius = (layout.radius[clip, slot][:, None] * growth)[..., None, None]
        dx = pixel - centre[..., :1, None]
        dy = (pixel - centre[..., 1:, None]).mT
        alpha = coverage(shape, dx, dy, radius, scale)[:, :, None]
        paint = COLOR_RGB.to(device)[layout.color[clip, slot]] - BACKGROUND_RGB.to(device)[layout.background[clip]]
        videos.index_add_(0, clip, alpha * paint[:, None, :, None, None])
