"""Test whether token scores with a transport solver judge bindings and relations better than scores without one.

    python benchmarks/token_scores.py outputs/vtm/vtm-0 ... outputs/vtm/vtm-4 --json outputs/token_scores.json
    python benchmarks/token_scores.py tiny-vtm --smoke                         # the same path in seconds

The encoder is frozen and has tiny-vtm's architecture. A small score on its word and video tokens is trained end to
end, also through the solver, to distinguish a clip's caption from two captions that are wrong in one attribute and
from another clip's caption (cross-entropy over the four). All scores get the same clips, captions, batches and steps.
With cost C = 1 - cos of learned projections and word weights a, they are:

    without transport
    matching          the encoder's matching head, not trained further
    pooled            cosine of learned projections of the class tokens
    max-sim           sum_i a_i max_j (1 - C_ij), late interaction (Khattab and Zaharia 2020)
    attention         each word attends to the tokens, A_ij = softmax_j(-C_ij / eps); an MLP on word and attended token
    attention, signs  -(1 - t) <C, P> - t GW(P) with P_ij = a_i A_ij: the structure below without a solver

    with transport: P minimises the same cost under sum_j P_ij = a_i and sum_i P_ij <= 4 / tokens
    plan              `attention`, A replaced by the plan's rows
    transport         -<C, P>
    fused GW          -(1 - t) <C, P> - t GW(P), structure: 0 between words of one group and 1 between groups, against
                      the distance of tokens in a frame
    fused GW, signs   the same, and the caption's relation: +1 along its axis from the first group to the second,
                      against the signed displacement of tokens. Distances alone cannot distinguish left from right.

GW(P) = sum_ijkl M_ik (S_ik - D_jl)^2 P_ij P_kl, M_ik = 1 if the caption says S_ik (Vayer et al. 2019); P is found by
three linearisations, each solved by 20 scaling steps. Groups and relations are read from the caption's grammar.

Sets of pairs and accuracy are those of ot_semantic_table.py (test splits); `within` is Spearman's correlation with the
verifier's alignment within the samples of one prompt. `control` is the accuracy on relation with the clip of another
pair: above .5 a score would read the answer from the caption. The comparison was fixed before it was run:
on binding and on relation, how much the best score with transport cuts the error of the best score without it (best by
the mean over encoders and seeds on that set), with a 95 % t-interval over encoders; and the same for `fused GW, signs`
against `attention, signs`, which differ only in the solver. The last line per set was added after the first results:
the same among the scores that do not know the relation.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ot_semantic_table import SETS, accuracy, problems, sampled
from scipy.stats import spearmanr
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

sys.path.insert(0, str(Path(__file__).parents[1] / "assets_src"))
from shapemotion_swaps import may_describe
from train_tiny_vtm import SWAPS, Bank

from pisces_rl.rewards.encoders import load_encoder
from pisces_rl.rewards.semantic import OTSemanticReward
from pisces_rl.shapemotion import verify

WITHOUT = ("matching", "pooled", "max-sim", "attention", "attention, signs")
WITH = ("plan", "transport", "fused GW", "fused GW, signs")
EPS, CAPACITY, SCALINGS, ROUNDS, WIDTH = 0.1, 4.0, 20, 3, 64


# --- the caption's structure -----------------------------------------------------------------------------------------


def structure(tokens: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return the group of each token (B, N), -1 if none, and the relation's direction (B, 2): x to the right, y down.

    Args:
        tokens: ids (B, N).
        names: the vocabulary, by id.
    """
    groups, direction = torch.full_like(tokens, -1), torch.zeros(len(tokens), 2)
    for row, ids in enumerate(tokens.tolist()):
        words, group = [names[i] for i in ids], 0
        for place, word in enumerate(words):
            if word == "on":  # the background
                break
            if word in ("and", "to", "above", "below"):
                group = 1
            if word in ("above", "below"):
                direction[row, 1] = 1 if word == "above" else -1
            elif word == "the":
                direction[row, 0] = 1 if words[place + 1] == "left" else -1
            if word.startswith("<") or word in ("and", "to", "the", "of", "above", "below"):
                continue
            if word in ("left", "right") and words[place - 1] == "the":
                continue
            groups[row, place] = group
    return groups, direction


def asked(groups: Tensor, direction: Tensor, signs: bool) -> list[tuple[Tensor, Tensor]]:
    """Return [(M, S)], each (B, N, N): where the caption says something, and what; apart, then along x and y."""
    known = groups >= 0
    both = (known[:, :, None] & known[:, None]).float()
    step = (groups[:, None] - groups[:, :, None]) * both  # +1 from the first group to the second
    found = [(both, step.abs())]
    if signs:
        for axis in (0, 1):
            sign = direction[:, axis, None, None]
            found.append((step.abs() * sign.abs(), step * sign))
    return found


def displacements(positions: Tensor, signs: bool) -> list[Tensor]:
    """Return the tokens' distance (M, M) within a frame, in [0, 1], and the signed displacements along x and y."""
    place = positions[:, 1:] / positions[:, 1:].max().clamp(min=1)  # row and column
    found = [(torch.cdist(place, place) * 2).clamp(max=1)]
    if signs:
        found += [(2 * (place[None, :, axis] - place[:, None, axis])).clamp(-1, 1) for axis in (1, 0)]
    return found


# --- plans -----------------------------------------------------------------------------------------------------------


def plan(cost: Tensor, weights: Tensor, capacity: float, eps: float = EPS, steps: int = SCALINGS) -> Tensor:
    """Return the entropic plan (B, N, M) under sum_j P_ij = a_i and sum_i P_ij <= capacity / M; differentiable.

    By scaling: v <- min(1, capacity / M / K'u), u <- a / K v. Rows are exact; a column may exceed its bound.
    """
    kernel = (-cost / eps).exp()
    bound, v = capacity / cost.shape[2], torch.ones_like(cost[:, 0])
    for _ in range(steps):
        u = weights / (kernel @ v[:, :, None])[:, :, 0]
        v = (bound / (u[:, None] @ kernel)[:, 0].clamp(min=1e-30)).clamp(max=1)
    u = weights / (kernel @ v[:, :, None])[:, :, 0]
    return u[:, :, None] * kernel * v[:, None]


def gw_gradient(plans: Tensor, said: list[tuple[Tensor, Tensor]], found: list[Tensor]) -> Tensor:
    """Return L(P)_ij = sum_kl M_ik (S_ik - D_jl)^2 P_kl, summed over the structures; <L(P), P> is GW(P)."""
    total = torch.zeros_like(plans)
    for (mask, wanted), distance in zip(said, found, strict=True):
        rows = (mask * wanted.square()) @ plans.sum(2, keepdim=True)
        total = total + rows - 2 * (mask * wanted) @ plans @ distance.T + mask @ plans @ distance.square().T
    return total


# --- scores ----------------------------------------------------------------------------------------------------------


class TokenScore(nn.Module):
    """A score of pairs of captions and clips on an encoder's frozen tokens; `kind` is a name of the list above."""

    def __init__(self, kind: str, width: int, positions: Tensor):
        super().__init__()
        self.kind = kind
        self.word, self.token = nn.Linear(width, WIDTH), nn.Linear(width, WIDTH)
        self.gate, self.value = nn.Linear(width, 1), nn.Linear(width, WIDTH)
        self.judge = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, 1))
        self.share = nn.Parameter(torch.zeros(()))  # t = sigmoid
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.signs = kind.endswith("signs")
        self.register_buffer("positions", positions[1:])  # without the class token

    def forward(self, text: dict[str, Tensor], video: Tensor) -> Tensor:
        """Return scores (B,) of texts (hidden, words, groups, direction) and video tokens (B, 1 + M, d), in pairs."""
        hidden, tokens = text["hidden"], video[:, 1:]
        if self.kind == "pooled":
            pair = normalize(self.word(hidden[:, 0]), dim=1) * normalize(self.token(video[:, 0]), dim=1)
            return self.scale.exp() * pair.sum(1)
        cost = 1 - normalize(self.word(hidden), dim=2) @ normalize(self.token(tokens), dim=2).mT
        weights = softplus(self.gate(hidden)[:, :, 0]) * text["words"]
        weights = weights / weights.sum(1, keepdim=True)
        if self.kind == "max-sim":
            return self.scale.exp() * (weights * (1 - cost).amax(2)).sum(1)
        by_attention = self.kind.startswith("attention")
        plans = weights[:, :, None] * (-cost / EPS).softmax(2) if by_attention else plan(cost, weights, CAPACITY)
        if self.kind in ("attention", "plan"):
            rows = plans / plans.sum(2, keepdim=True).clamp(min=1e-12)
            judged = self.judge(torch.cat([self.word(hidden), rows @ self.value(tokens)], 2))[:, :, 0]
            return (weights * judged).sum(1)
        if self.kind == "transport":
            return -self.scale.exp() * (cost * plans).sum((1, 2))
        said = asked(text["groups"], text["direction"], self.signs)
        found = displacements(self.positions, self.signs)
        share = self.share.sigmoid()
        for _ in range(ROUNDS if not by_attention else 0):
            linear = (1 - share) * cost + 2 * share * gw_gradient(plans, said, found)
            plans = plan(linear, weights, CAPACITY)
        together = (1 - share) * cost + share * gw_gradient(plans, said, found)
        return -self.scale.exp() * (together * plans).sum((1, 2))


class Frozen:
    """The encoder's tokens of captions and clips."""

    def __init__(self, encoder, device: torch.device):
        self.encoder, self.device = encoder.to(device), device
        ids = encoder.tokenizer.get_vocab()
        self.names = sorted(ids, key=ids.get)

    @torch.no_grad()
    def text(self, ids: Tensor) -> dict[str, Tensor]:
        tokenizer = self.encoder.tokenizer
        mask = ids != tokenizer.pad_token_id
        groups, direction = structure(ids, self.names)
        special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.eos_token_id)
        found = {
            "hidden": self.encoder.text.read(ids.to(self.device), mask.to(self.device)).float(),
            "words": (mask & ~special).float(),
            "groups": groups,
            "direction": direction,
        }
        return {name: value.to(self.device) for name, value in found.items()}

    @torch.no_grad()
    def video(self, videos: Tensor, size: int = 256) -> Tensor:
        """Return tokens (n, 1 + M, d) of clips (n, F, 3, H, W) in [0, 1] or bytes."""
        parts = []
        for part in videos.split(size):
            part = part.to(self.device)
            parts.append(self.encoder.encode_video(part.float() / 255 if part.dtype == torch.uint8 else part).tokens)
        return torch.cat(parts).float()


def pick(text: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in text.items()}


def train(kind: str, frozen: Frozen, data: dict, seed: int, args) -> TokenScore:
    """Train one score; batches depend on the seed alone."""
    torch.manual_seed(seed)
    score = TokenScore(kind, data["video"].shape[2], data["positions"]).to(frozen.device)
    optimizer = torch.optim.AdamW(score.parameters(), args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        rows = torch.randperm(len(data["video"]), generator=generator)[: args.batch]
        wrong = [torch.randint(SWAPS, (len(rows),), generator=generator) for _ in range(2)]
        other = rows.roll(1)
        told = may_describe(data["specs"][rows], data["layout"][rows], data["specs"][other]).diagonal()
        rejected = [~data["valid"][rows, swap] for swap in wrong] + [told]
        texts = [data["own"][rows], *(data["wrong"][rows, swap] for swap in wrong), data["own"][other]]
        text, video = pick(data["text"], torch.cat(texts)), data["video"][rows.to(frozen.device)].repeat(4, 1, 1)
        logits = score(text, video).view(4, -1).T
        logits = torch.cat(
            [logits[:, :1], logits[:, 1:].masked_fill(torch.stack(rejected, 1).to(logits.device), -1e4)], 1
        )
        loss = cross_entropy(logits, torch.zeros(len(rows), dtype=torch.long, device=logits.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(score.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return score.eval()


def prepare(frozen: Frozen, args) -> dict:
    """Return the tokens of the training clips, and of each distinct caption once."""
    bank = Bank(args.clips, frozen.encoder.tokenizer, torch.device("cpu"), 900_000)
    ids = torch.cat([bank.tokens[:, None], bank.wrong], 1)
    distinct, index = ids.flatten(0, 1).unique(dim=0, return_inverse=True)
    index = index.view(ids.shape[:2])
    texts = [frozen.text(part) for part in distinct.split(2048)]
    positions = frozen.encoder.encode_video(bank.videos[:1].to(frozen.device).float() / 255).positions
    return {
        "video": frozen.video(bank.videos),
        "positions": positions,
        "text": {name: torch.cat([part[name] for part in texts]) for name in texts[0]},
        "own": index[:, 0],
        "wrong": index[:, 1:],
        "valid": bank.valid,
        "specs": bank.specs,
        "layout": bank.layout,
    }


class Judged:
    """The sets of pairs on an encoder's tokens.

    Args:
        frozen: the encoder.
        sets: {name: (videos, right captions, wrong captions)}.
        samples: videos, prompts and pairs of rows, the better one first.
        group: samples per prompt.
    """

    def __init__(self, frozen: Frozen, sets: dict, samples: tuple, group: int = 8):
        self.frozen, self.samples, self.group = frozen, samples, group
        self.truth = np.asarray(verify(samples[0], samples[1]).alignment).reshape(-1, group)
        self.clips = {name: (videos, (right, wrong)) for name, (videos, right, wrong) in sets.items()}
        self.clips["samples"] = (samples[0], (samples[1],))
        self.video = {name: frozen.video(videos) for name, (videos, _) in self.clips.items()}
        self.text = {name: [self._tokens(part) for part in parts] for name, (_, parts) in self.clips.items()}

    def _tokens(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = self.frozen.encoder
        length = encoder.config.max_text_tokens
        found = encoder.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        return self.frozen.text(found.input_ids)

    @torch.no_grad()
    def scores(self, score: TokenScore | None, name: str, which: int, shift: int = 0) -> Tensor:
        """Return the scores (n,) of the captions `which` of a set with its clips, or with those `shift` rows away; the
        score None is the encoder's own matching head."""
        if score is None:
            videos, prompts = self.clips[name][0].roll(shift, 0), self.clips[name][1]
            logits = OTSemanticReward(self.frozen.encoder, None, micro_batch=256).logits(
                prompts[which], videos.to(self.frozen.device)
            )
            return (logits[:, 1] - logits[:, 0]).cpu()
        text, video = self.text[name][which], self.video[name].roll(shift, 0)
        parts = torch.arange(len(video), device=video.device).split(256)
        return torch.cat([score(pick(text, rows), video[rows]) for rows in parts]).cpu()

    def measure(self, score: TokenScore | None) -> dict[str, float]:
        """Return the accuracy on each set and the rank correlation within a prompt."""
        found = {
            name: accuracy(self.scores(score, name, 0) - self.scores(score, name, 1))
            for name in self.clips
            if name != "samples"
        }
        control = [self.scores(score, "relation", which, shift=1) for which in (0, 1)]
        found["control"] = accuracy(control[0] - control[1])
        values, pairs = self.scores(score, "samples", 0), self.samples[2]
        found["samples"] = accuracy(values[pairs[:, 0]] - values[pairs[:, 1]])
        rows = zip(values.view(-1, self.group).numpy(), self.truth)
        within = [spearmanr(s, t).statistic for s, t in rows if np.ptp(s) > 0 and np.ptp(t) > 0]
        return found | {"within": float(np.mean(within))}


def half_interval(values: np.ndarray) -> float:
    """Return half of the 95 % t-interval of the mean."""
    return student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def tables(kept: dict, encoders: list[str], seeds: list[int]) -> None:
    """Print the accuracies of the scores that every encoder has, then, if all were measured, the cuts of the error."""
    columns = (*SETS, "control", "within")
    values = {
        kind: np.array(
            [np.mean([[kept[f"{e} {kind} {s}"][c] for c in columns] for s in seeds], axis=0) for e in encoders]
        )
        for kind in (*WITHOUT, *WITH)
        if all(f"{e} {kind} {s}" in kept for e in encoders for s in seeds)
    }
    print("| score | transport | " + " | ".join(columns) + " |\n" + "|---" * 8 + "|")
    for kind, found in values.items():
        cells = [f"{100 * value.mean():.1f} +- {100 * half_interval(value):.1f}" for value in found.T[:-1]]
        cells.append(f"{found[:, -1].mean():.3f} +- {half_interval(found[:, -1]):.3f}")
        print(f"| {kind} | {'yes' if kind in WITH else 'no'} | {' | '.join(cells)} |")
    if len(values) < len(WITHOUT) + len(WITH):
        return
    print("\n| set | without | with | error cut % |\n|---|---|---|---|")
    for name in ("binding", "relation"):
        column = SETS.index(name)
        means = {kind: found[:, column].mean() for kind, found in values.items()}
        unsigned = [[kind for kind in kinds if not kind.endswith("signs")] for kinds in (WITHOUT, WITH)]
        pairs = [
            tuple(max(kinds, key=means.get) for kinds in (WITHOUT, WITH)),
            ("attention, signs", "fused GW, signs"),
            tuple(max(kinds, key=means.get) for kinds in unsigned),
        ]
        for plain, transport in dict.fromkeys(pairs):
            errors = [1 - values[kind][:, column] for kind in (plain, transport)]
            if errors[0].all():
                cut = 100 * (1 - errors[1] / errors[0])
                mean, half = cut.mean(), half_interval(cut)
                cell = f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"
            else:
                cell = f"no error to cut; with transport {100 * errors[1].mean():.1f} % error"
            print(f"| {name} | {plain} | {transport} | {cell} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoders", nargs="+", help="folders of tiny-vtm, or its name")
    add("--seeds", type=int, nargs="+", default=[0], help="of the scores")
    add("--kinds", nargs="+", help="train only these")
    add("--clips", type=int, default=16_384, help="to train on")
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=2e-3)
    add("--count", type=int, default=150, help="swaps a set and split, at most")
    add("--json", type=Path, help="keep the results there, and do not measure what is there again")
    add("--smoke", action="store_true", help="a few steps of a few clips")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.smoke:
        args.clips, args.steps, args.batch, args.count = 128, 3, 16, 4
    kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.is_file() else {}
    start = time.time()
    sets, samples = problems(False, args.count)
    if args.smoke:
        samples = sampled(("test_seen",), 2)
    for name in args.encoders:
        missing = [
            (kind, seed)
            for kind in args.kinds or (*WITHOUT, *WITH)
            for seed in args.seeds
            if f"{name} {kind} {seed}" not in kept
        ]
        if not missing:
            continue
        frozen = Frozen(load_encoder(name), torch.device(args.device))
        judged, data = Judged(frozen, sets, samples), prepare(frozen, args)
        for kind, seed in missing:
            score = None if kind == "matching" else train(kind, frozen, data, seed, args)
            kept[f"{name} {kind} {seed}"] = found = judged.measure(score)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(f"{name} {kind} {seed}  {found}  {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    tables(kept, args.encoders, args.seeds)


if __name__ == "__main__":
    main()
