"""Cross-attention fused with a transport plan between words and video tokens: the core of the semantic reward.

For one layer, let A (B, H, N, M) be the attention of H heads, y_i and x_j the projected queries and keys with all
heads concatenated, t_j and s_j the frame and the spatial position of video token j:

    C_ij = [1 - cos(y_i, x_j)] + gamma |tau_i - t_j| + eta |pi_i - s_j|
    tau_i = sum_k A_ik t_k,  pi_i = sum_k A_ik s_k

Each term is scaled to [0, 1] by its range within the plan, and then C as a whole (`normalise`). Padding and special
tokens of the text, and video tokens without a position, are excluded from the plan and keep their attention. tau and
pi use attention renormalised to sum 1 over the video tokens in the plan. Source: arXiv 2602.01624, section 4.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pisces_rl.ot import cosine_cost, partial_transport_plan, pisces_plan, transport_plan
from pisces_rl.ot import fused as fused_plans
from pisces_rl.ot.constraints import Balanced, Penalised
from pisces_rl.ot.plans import check_solver
from pisces_rl.rewards import fused_ot_attention as fused
from pisces_rl.rewards.graphs import by_graph

PLANS = ("paper", "partial", "unbalanced", "balanced")
FUSIONS = ("log", "arithmetic", "gated")
LAUNCH_BOUND = 2**20  # layers with at most this many cells spend less time in kernels than launching them


@dataclass
class Drawing:
    """One layer's attention (B, H, N, M) before and after fusion, and its plan, for pictures."""

    layer: int
    attention: Tensor
    plan: Tensor
    fused: Tensor


@dataclass
class OTAttention:
    """A fusion for `pisces_rl.rewards.attention`: bound to a batch by `bind`, called by each cross-attention layer.

    Attributes:
        plan: "unbalanced" penalises marginals with rho = reg mass / (1 - mass): in the log fusion this is the
            published plan, solved in a few iterations. "partial" moves exactly the share `mass` of the words' weight,
            which takes twenty times as many. "balanced" moves all. "paper" is the published iteration.
        fusion: "log": A~ proportional to A P along each row, over the video tokens of the plan, which keep their total
            attention. The scale of P's rows cancels, so a word cannot stay unmatched.
            "gated": the same, times the share of its weight that the word moves, N sum_j P_ij, at most 1.
            "arithmetic": (A + N P) / 2, whose rows sum to less than 1 if a word moves less than its weight.
        mass: m in (0, 1].
        reg: eps, in units of the cost.
        temporal: gamma.
        spatial: eta.
        normalise: scale each term and C to [0, 1]. False: t and s stay in frames and patches.
        layers: layers to fuse, as the model numbers them; None: all.
        heads: heads to fuse, as the model numbers them; None: all.
        floor: e in A~ proportional to (A + e)(P + e), P with rows of sum 1; 0: plain product. Not in "arithmetic".
        class_tokens: include video tokens without a position in the plan, as frame -1 at the mean position.
        solver: "native", or "geomloss" for unbalanced and balanced plans, see docs/ot.md.
        tolerance: of the plans' marginals.
        drawings: a list to which each call appends a `Drawing`, or None.

    Gradients treat the plan as a constant. Published settings: plan "paper", fusion "log", floor 1e-6, class_tokens
    True; in the first release plan "partial", fusion "arithmetic", temporal 0.1, normalise False, class_tokens True.
    """

    plan: str = "unbalanced"
    fusion: str = "arithmetic"
    mass: float = 0.9
    reg: float = 0.05
    temporal: float = 0.2
    spatial: float = 0.2
    normalise: bool = True
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    floor: float = 0.0
    class_tokens: bool = False
    solver: str = "native"
    tolerance: float = 1e-3
    drawings: list[Drawing] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value, allowed in (("plan", self.plan, PLANS), ("fusion", self.fusion, FUSIONS)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}.")
        check_solver(self.solver)
        if self.solver != "native" and self.plan not in ("unbalanced", "balanced"):
            raise ValueError(f"solver={self.solver!r}: no {self.plan} plans, only unbalanced and balanced ones.")
        if not 0 < self.mass <= 1 or (self.mass == 1 and self.plan == "unbalanced"):
            raise ValueError(f"mass={self.mass!r}: expected a share in (0, 1], below 1 for unbalanced plans.")
        if not (self.reg > 0 and math.isfinite(self.reg)):
            raise ValueError(f"reg={self.reg!r}: expected a finite number > 0.")
        for name in ("temporal", "spatial", "floor"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value!r}: expected a finite number >= 0.")
        if not isinstance(self.normalise, bool):
            raise ValueError(f"normalise={self.normalise!r}: expected True or False.")
        if self.floor and self.fusion == "arithmetic":
            raise ValueError(
                f"floor={self.floor!r}: the arithmetic fusion has no floor; choose 'log' or 'gated', or 0."
            )
        for name, numbers in (("layers", self.layers), ("heads", self.heads)):
            if numbers is not None and not _is_list_of_numbers(numbers):
                raise ValueError(
                    f"{name}={numbers!r}: expected a list of numbers >= 0, at least one, or None for all."
                )

    @property
    def reach(self) -> float | None:
        """rho of the unbalanced plan."""
        return self.reg * self.mass / (1 - self.mass) if self.plan == "unbalanced" else None

    def bind(self, words: Tensor, positions: Tensor, layers: Sequence[int] | None = None) -> "BoundOTAttention":
        """Bind to texts with words marked in (B, N) and video tokens at positions (M, 3); fuse at most `layers`."""
        return BoundOTAttention(self, words, positions, layers)


@dataclass
class BoundOTAttention:
    settings: OTAttention
    words: Tensor
    positions: Tensor
    layers: Sequence[int] | None = None
    repeated: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)  # weights by heads

    def changes(self, layer: int) -> bool:
        """Return whether this layer's attention is fused at all."""
        return all(layers is None or layer in layers for layers in (self.settings.layers, self.layers))

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        logits: Tensor,
        scaling: float,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the weights (B, H, N, M) of one layer: softmax(logits + bias + mask) times each word's gate."""
        settings, dtype = self.settings, dtype or logits.dtype
        plain = not settings.floor and settings.heads is None and settings.drawings is None and mask is None
        plain = plain and not logits.requires_grad and fused.serves(logits)
        if plain and logits.is_cuda and logits.numel() <= LAUNCH_BOUND:
            weights = self._by_graph(query, key, logits, scaling, dtype)
            if weights is not None:
                return weights
        with torch.no_grad():
            plan = self.solve(self.cost(query, key, logits, scaling))
        if plain:
            return fused.fuse(settings.fusion, logits, plan, self.words, self.columns, dtype)
        bias, gate = self.fuse(logits, plan)
        if settings.heads is not None:
            chosen = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            chosen[list(settings.heads)] = True
            bias = torch.where(chosen[:, None, None], bias, 0.0)
            gate = None if gate is None else torch.where(chosen[:, None], gate, 1.0)
        weights = (logits + bias if mask is None else logits + bias + mask).softmax(-1)
        weights = weights if gate is None else weights * gate[..., None]
        if settings.drawings is not None:
            drawn = (logits.softmax(-1), plan.expand_as(logits), weights)
            settings.drawings.append(Drawing(layer, *(x.detach().cpu() for x in drawn)))
        return weights.to(dtype)

    def _by_graph(
        self, query: Tensor, key: Tensor, logits: Tensor, scaling: float, dtype: torch.dtype
    ) -> Tensor | None:
        """Compute the weights in one launch; None if that is not possible or a plan misses its tolerance."""
        s = self.settings
        served = fused_plans.serves(logits[0], s.tolerance)
        if not s.normalise or s.solver != "native" or s.plan not in ("unbalanced", "balanced") or not served:
            return None
        heads = logits.shape[1] if s.temporal or s.spatial else 1
        constraint = Balanced() if s.reach is None else Penalised(s.reach)

        def weights(
            query: Tensor,
            key: Tensor,
            logits: Tensor,
            words: Tensor,
            columns: Tensor,
            frame: Tensor,
            place: Tensor,
            a: Tensor,
            b: Tensor,
        ) -> tuple[Tensor, Tensor]:
            cost = fused.costs(query, key, logits, scaling, words, columns, frame, place, s.temporal, s.spatial)
            plan, _, error, *_ = fused_plans.solve(
                cost.flatten(0, 1), a, b, s.reg, constraint, s.tolerance, fused_plans.MAX_ITERATIONS
            )
            return fused.fuse(s.fusion, logits, plan.unflatten(0, (-1, heads)), words, columns, dtype), error

        done = by_graph(
            (s.plan, s.fusion, s.mass, s.reg, s.temporal, s.spatial, s.tolerance, scaling, dtype),
            weights,
            query,
            key,
            logits,
            self.words,
            self.columns,
            *(z.to(logits) for z in self.places),
            *self.weights_of(heads),
        )
        if done is None:
            return None
        result = done[0].clone()
        return result if (done[1].cpu() <= s.tolerance).all() else None

    @cached_property
    def columns(self) -> Tensor:
        """(M,): True for video tokens that are part of the plan."""
        placed = self.positions.isfinite().all(1)
        return torch.ones_like(placed) if self.settings.class_tokens else placed

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Frames (M,) and spatial positions (M, 2); tokens without one get frame -1 and the mean position."""
        placed = self.positions.isfinite().all(1)
        middle = self.positions[placed].mean(0)
        return (
            torch.where(placed, self.positions[:, 0], -1.0),
            torch.where(placed[:, None], self.positions[:, 1:], middle[1:]),
        )

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """(B, N), (B, M): the words of a text have total weight 1, and so do the video tokens."""
        a = self.words.to(self.positions) / self.words.sum(1, keepdim=True).clamp_min(1)
        b = self.columns.to(a) / self.columns.sum()
        return a, b.expand(len(a), -1)

    def weights_of(self, heads: int) -> tuple[Tensor, Tensor]:
        """Repeat the weights for each head, (B heads, N) and (B heads, M)."""
        if heads not in self.repeated:
            a, b = self.weights
            self.repeated[heads] = a.repeat_interleave(heads, 0), b.repeat_interleave(heads, 0)
        return self.repeated[heads]

    def cost(self, query: Tensor, key: Tensor, logits: Tensor, scaling: float) -> Tensor:
        """Return costs (B, H, N, M) over words and `columns`, 0 outside; (B, 1, N, M) if they do not vary by head."""
        settings = self.settings
        alike = not settings.temporal and not settings.spatial
        frame, place = (z.to(logits) for z in self.places)
        if settings.normalise and fused.serves(logits):
            return fused.costs(
                query,
                key,
                logits,
                scaling,
                self.words,
                self.columns,
                frame,
                place,
                settings.temporal,
                settings.spatial,
            )
        y, x = (z.transpose(1, 2).flatten(2) for z in (query, key))
        cosine = cosine_cost(y, x)
        cells = self.words[:, None, :, None] & self.columns
        scaled = _to_unit_range if settings.normalise else _inside
        cost = scaled(cosine[:, None], cells)
        if alike:
            return scaled(cost, cells)
        attention = logits.masked_fill(~self.columns, -torch.inf).softmax(-1)
        if settings.temporal:
            distance = ((attention @ frame)[..., None] - frame).abs()
            cost = cost + settings.temporal * scaled(distance, cells)
        if settings.spatial:
            looks = attention @ place
            distance = torch.hypot(looks[..., :1] - place[:, 0], looks[..., 1:] - place[:, 1])
            cost = cost + settings.spatial * scaled(distance, cells)
        return scaled(cost, cells)

    def solve(self, cost: Tensor) -> Tensor:
        """Solve all problems of the layer in one batch; return plans in the shape of the costs. A text without words
        has a zero plan."""
        s, heads = self.settings, cost.shape[1]
        a, b = self.weights_of(heads)
        cost = cost.flatten(0, 1)
        if s.plan == "paper":
            plan = pisces_plan(cost, a, b, mass=s.mass, reg=s.reg, tolerance=s.tolerance).plan
        elif s.plan == "partial":
            mass = s.mass * a.sum(1)
            plan = partial_transport_plan(cost, a, b, mass=mass, reg=s.reg, tolerance=s.tolerance).plan
        else:
            plan = transport_plan(cost, a, b, reg=s.reg, reach=s.reach, tolerance=s.tolerance, solver=s.solver).plan
        return plan.unflatten(0, (-1, heads))

    def fuse(self, logits: Tensor, plan: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what to add to the logits, and the gate."""
        s, columns, tiny = self.settings, self.columns, torch.finfo(logits.dtype).tiny
        cells = self.words[:, None, :, None] & columns
        log_attention = logits.log_softmax(-1)
        attention = log_attention.exp()
        moved = plan.sum(-1, keepdim=True)
        count = self.words.sum(1)[:, None, None, None]
        if s.fusion == "arithmetic":
            inside = torch.where(columns, attention, 0.0).sum(-1, keepdim=True)
            mixed = (attention + torch.where(cells, inside * count * plan, torch.where(columns, 0.0, attention))) / 2
            total = mixed.sum(-1, keepdim=True)
            bias = (mixed / total).clamp_min(tiny).log() - log_attention
            rows = self.words[:, None, :, None]
            return torch.where(rows, bias, 0.0), torch.where(rows, total, 1.0)[..., 0]
        rows_of_plan = plan / moved.clamp_min(tiny)
        log_fused = log_attention + rows_of_plan.clamp_min(tiny).log()
        if s.floor:
            log_fused = (attention + s.floor).log() + (rows_of_plan + s.floor).log()
        before = _logsumexp(log_attention, columns)
        after = _logsumexp(log_fused, columns)
        bias = torch.where(cells, log_fused - log_attention + before - after, 0.0)
        if s.fusion == "log":
            return bias, None
        share = (moved * count)[..., 0].clamp_max(1)  # share of the word's weight that is moved
        return bias, torch.where(self.words[:, None], share, 1.0).expand(logits.shape[:3])


def _is_list_of_numbers(value: object) -> bool:
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)


def _logsumexp(x: Tensor, columns: Tensor) -> Tensor:
    return x.masked_fill(~columns, torch.finfo(x.dtype).min).logsumexp(-1, keepdim=True)


def _inside(x: Tensor, cells: Tensor) -> Tensor:
    return torch.where(cells, x, 0.0)


def _to_unit_range(x: Tensor, cells: Tensor) -> Tensor:
    """Scale each plan's cells to [0, 1] by their range; 0 if they are all equal, and outside the plan."""
    low = x.masked_fill(~cells, torch.inf).amin((-1, -2), keepdim=True)
    high = x.masked_fill(~cells, -torch.inf).amax((-1, -2), keepdim=True)
    scaled = (x - low) / (high - low).clamp_min(1e-12)
    return torch.where(cells & (high > low), scaled, 0.0)
