"""Make captions that are wrong in one attribute, and find which captions of a batch describe which clips."""

import torch
from torch import Tensor

from pisces_rl.shapemotion import Layout, SceneSpecs
from pisces_rl.shapemotion.layout import DURATION
from pisces_rl.shapemotion.splits import SPLITS, split_index

ATTRIBUTES = ("shape", "color", "size", "motion", "speed", "count", "relation", "scene", "binding")
WEIGHTS = (1.0, 1.0, 1.5, 1.5, 2.0, 1.5, 3.0, 0.7, 2.0)  # relative frequency of each swap among the possible ones
_OPPOSITE_RELATION = (0, 2, 1, 4, 3)


def swap(
    specs: SceneSpecs, generator: torch.Generator, attribute: str | None = None, split: str | None = None
) -> tuple[SceneSpecs, Tensor, Tensor]:
    """Return N captions that each differ from the given one in one attribute, so that no clip fits both.

    Args:
        attribute: one of `ATTRIBUTES`; None draws one for each caption among those that it names.
        split: the split that the new captions must belong to as well. If wrong captions in training came from other
            splits, a model could learn that such captions are never true.

    Returns:
        The captions, (N,) index into `ATTRIBUTES`, and (N,) bool, whether a swap was possible.
    """
    device, n = specs.shape.device, len(specs)
    rows = torch.arange(n, device=device)

    def draw(high: int) -> Tensor:
        return torch.randint(0, high, (n,), device=device, generator=generator)

    two = specs.shape[:, 1] >= 0
    g = torch.where(two, draw(2), 0)
    own = {name: getattr(specs, name)[rows, g] for name in ("shape", "color", "size", "motion", "speed")}
    told = two & (specs.color >= 0).all(1)
    differ = (specs.shape[:, 0] != specs.shape[:, 1]) | (specs.relation > 0)
    possible = torch.stack(
        [
            torch.ones_like(two),
            own["color"] >= 0,
            own["size"] >= 0,
            own["motion"] >= 0,
            own["speed"] >= 0,
            ~two,
            specs.relation > 0,
            specs.background >= 0,
            told & differ,
        ],
        1,
    )
    wanted = [w if attribute in (None, name) else 0.0 for name, w in zip(ATTRIBUTES, WEIGHTS, strict=True)]
    weights = possible * torch.tensor(wanted, device=device)
    valid = weights.sum(1) > 0
    chosen = torch.multinomial(weights + (~valid)[:, None], 1, generator=generator)[:, 0]

    new = specs[rows]

    def put(name: str, values: Tensor) -> None:
        pick = valid & (chosen == ATTRIBUTES.index(name))
        getattr(new, name)[rows[pick], g[pick]] = values[pick]

    put("shape", (own["shape"] + 1 + draw(3)) % 4)
    other = torch.where(two, specs.color[rows, 1 - g], -1)
    color = (own["color"] + 1 + draw(5)) % 6
    for _ in range(2):  # two groups have two colors
        color = torch.where((color == other) | (color == own["color"]), (color + 1) % 6, color)
    put("color", color)
    put("size", 1 - own["size"])
    directions = (own["motion"] + draw(3)) % 4 + 1  # a different one of the four
    put("motion", torch.where(own["speed"] >= 0, directions, (own["motion"] + 1 + draw(6)) % 7))
    put("speed", 1 - own["speed"])
    put("count", specs.count[rows, g] % 3 + 1)
    pick = valid & (chosen == ATTRIBUTES.index("relation"))
    new.relation[pick] = torch.tensor(_OPPOSITE_RELATION, device=device)[specs.relation[pick]]
    pick = valid & (chosen == ATTRIBUTES.index("scene"))
    new.background[pick] = ((specs.background + 1 + draw(2)) % 3)[pick]
    pick = valid & (chosen == ATTRIBUTES.index("binding"))
    new.color[pick] = specs.color[pick].flip(1)
    if split is not None:
        valid = valid & (split_index(new) == list(SPLITS).index(split))
    new.set(~valid, specs[~valid])
    return new, chosen, valid


def may_describe(specs: SceneSpecs, layout: Layout, captions: SceneSpecs) -> Tensor:
    """Return (clips, captions) bool: whether a caption is true of a clip and so not a negative.

    A caption's groups are compared with the clip's in both orders; `specs` and `layout` are those of the clips.
    """
    rows = torch.arange(len(specs), device=specs.shape.device)
    slots = torch.stack([torch.zeros_like(rows), specs.count[:, 0].clamp(max=layout.present.shape[1] - 1)], 1)

    def shown(values: Tensor) -> Tensor:  # (clips, 2): of the first object of each group
        return values[rows[:, None], slots]

    speed = shown(layout.velocity.norm(dim=-1))
    radius = shown(layout.radius * (1 + layout.growth) / 2)
    middle = layout.start + layout.velocity * DURATION / 2
    x, y = shown(middle[..., 0]), shown(middle[..., 1])

    def fits(i: int, j: int) -> Tensor:
        """Compare group i of the clips with group j of the captions."""
        asked = {name: getattr(captions, name)[None, :, j] for name in ("shape", "color", "motion", "size", "speed")}
        ok = (specs.count[:, None, i] == captions.count[None, :, j]) & (specs.shape[:, None, i] == asked["shape"])
        for name in ("color", "motion"):
            ok &= (asked[name] < 0) | (shown(getattr(layout, name))[:, None, i] == asked[name])
        ok &= (asked["size"] < 0) | ((asked["size"] == 1) == (radius[:, None, i] > 3.85))
        return ok & ((asked["speed"] < 0) | ((asked["speed"] == 1) == (speed[:, None, i] > 0.62)))

    def related(sign: int) -> Tensor:
        along_x, along_y = (sign * (z[:, 1] - z[:, 0])[:, None] for z in (x, y))
        relation = captions.relation[None]
        ok = relation <= 0
        for index, along in ((1, along_x), (2, -along_x), (3, along_y), (4, -along_y)):
            ok = ok | ((relation == index) & (along > 0))
        return ok

    pair_of_clip, pair_of_caption = (x.shape[:, 1] >= 0 for x in (specs, captions))
    single = ~pair_of_clip[:, None] & ~pair_of_caption[None] & fits(0, 0)
    straight = fits(0, 0) & fits(1, 1) & related(1)
    crossed = fits(1, 0) & fits(0, 1) & related(-1)
    pairs = pair_of_clip[:, None] & pair_of_caption[None] & (straight | crossed)
    scene = (captions.background < 0)[None] | (captions.background[None] == layout.background[:, None])
    return (single | pairs) & scene
