"""Train variants of tiny-vtm whose text and video embeddings are aligned on few pairs, or on none.

    python assets_src/train_unaligned.py --output outputs/unaligned --seed 0           # one GPU
    python assets_src/train_unaligned.py --output /tmp/x --smoke                       # the same path in seconds

Each tower is first trained alone, through its pooled embedding: the video tower reconstructs its clip (5 frames of
16 x 16 pixels), the text tower restores a caption of which 15 % of the words are masked. Captions and clips are
sampled independently. Variants, all trained on the same captions and clips:
    alone          no pair
    joint-N        the two losses, and a contrastive loss over N pairs (`all`: every caption with its clip)
    frozen-N       the towers of `alone`, frozen; linear heads trained by the contrastive loss over N pairs
    few            the contrastive loss alone, over all pairs, without hard negatives, for a tenth of the steps
Each variant's folder contains the encoder and settings.json (arguments, final losses, SHA-256 of the weights), so that
the hash is known before any map is fitted on it. Only prompts and layouts of the train split are used.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from muon import Muon
from torch import Tensor, nn
from train_tiny_vtm import Bank, augment, build_tokenizer
from train_tiny_wan import Average, autocast, set_lr

from pisces_rl.rewards.encoders import TinyVTM, TinyVTMConfig

PAIRS = (256, 1024, 4096)
FRAMES, SIDE = 5, 16  # of a reconstructed clip
SMOKE = {
    "bank_clips": 256,
    "steps": 4,
    "batch": 16,
    "pair_batch": 16,
    "head_steps": 4,
    "warmup": 1,
    "width": 48,
    "heads": 2,
    "pairs": [16, 32],
}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the variants' folders")
    add("--seed", type=int, default=0, help="of data, weights and batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--smoke", action="store_true", help="a few steps of a few clips: shows that the script runs, trains nothing")
    add("--variants", nargs="+", help="only these, for instance alone joint-256")
    add("--pairs", type=int, nargs="+", default=list(PAIRS))
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--bank_clips", type=int, default=100_000)
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=512)
    add("--pair_batch", type=int, default=256)
    add("--head_steps", type=int, default=500, help="of the heads on frozen towers")
    add("--muon_lr", type=float, default=6e-3, help="matrices")
    add("--lr", type=float, default=1.5e-3, help="everything else, by AdamW")
    add("--warmup", type=int, default=100)
    add("--ema", type=float, default=0.998)
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def pair_bank(count: int, seed: int, tokenizer) -> Bank:
    """The pairs of a seed: the same on every device, and for the maps that are fitted on them."""
    return Bank(count, tokenizer, torch.device("cpu"), 500_000 + seed)


class Objectives(nn.Module):
    """Losses of the two towers through their pooled embeddings, and between them."""

    def __init__(self, model: TinyVTM, compiled: bool, hidden: int = 512):
        super().__init__()
        config = model.config
        self.model, self.scale = model, nn.Parameter(torch.tensor(2.66))
        self.word_input = nn.Linear(config.projection, config.width)
        self.word_positions = nn.Parameter(torch.randn(config.max_text_tokens, config.width) * 0.1)
        self.word_output = nn.Sequential(
            nn.GELU(), nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.vocabulary)
        )
        self.pixels = nn.Sequential(
            nn.Linear(config.projection, hidden), nn.GELU(), nn.Linear(hidden, FRAMES * 3 * SIDE * SIDE)
        )
        self.see, self.read = (torch.compile(f) if compiled else f for f in (self._see, self._read))

    def _see(self, videos: Tensor) -> Tensor:
        """Pooled embeddings (B, D) of videos (B, F, 3, H, W) in [-1, 1]."""
        return self.model.encode_prepared(self.model.padded(videos)).pooled

    def _read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model.unit(self.model.text_projection(self.model.text.read(tokens, mask)[:, 0]))

    def reconstruction(self, videos: Tensor) -> Tensor:
        """Mean squared error of the clip from its embedding, over the batch's variance around its mean clip."""
        with autocast(videos.device):
            predicted = self.pixels(self.see(videos)).float()
        frames = videos[:, torch.linspace(0, videos.shape[1] - 1, FRAMES).long()]
        target = F.adaptive_avg_pool2d(frames.flatten(0, 1), SIDE).reshape(len(videos), -1)
        return (predicted - target).square().mean() / (target - target.mean(0)).square().mean()

    def masked_words(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of all words of a caption from the embedding of the caption with 15 % of its words masked."""
        tokenizer = self.model.tokenizer
        mask = tokens != tokenizer.pad_token_id
        ends = (tokens == tokenizer.cls_token_id) | (tokens == tokenizer.eos_token_id)
        hidden = (torch.rand(tokens.shape, device=tokens.device) < 0.15) & mask & ~ends
        with autocast(tokens.device):
            pooled = self.read(tokens.masked_fill(hidden, tokenizer.unk_token_id), mask)
            logits = self.word_output(self.word_input(pooled)[:, None] + self.word_positions).float()
        return F.cross_entropy(logits[mask], tokens[mask])

    def contrast(self, z: Tensor, text: Tensor, same: Tensor) -> Tensor:
        """Symmetric contrastive loss of (B, D) each; what `same` (B, B) marks off the diagonal is no negative."""
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (self.scale.exp().clamp(max=50) * z.float() @ text.float().T).masked_fill(same & others, -1e4)
        target = torch.arange(len(z), device=z.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def paired(self, bank: Bank, rows: Tensor) -> Tensor:
        videos = augment(bank.videos[rows].float() / 255) * 2 - 1
        tokens = bank.tokens[rows]
        with autocast(videos.device):
            z, text = self.see(videos), self.read(tokens, tokens != self.model.tokenizer.pad_token_id)
        return self.contrast(z, text, same_caption(tokens))


def same_caption(tokens: Tensor) -> Tensor:
    """(B, B): whether two captions are the same, word by word."""
    return (tokens[:, None] == tokens[None]).all(-1)


def optimizers_of(named: list, args: argparse.Namespace, device: torch.device) -> list:
    matrices = [p for n, p in named if p.ndim == 2 and min(p.shape) >= 32 and "embeddings" not in n]
    chosen = {id(p) for p in matrices}
    return [
        Muon(matrices, args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(
            [p for _, p in named if id(p) not in chosen],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=device.type == "cuda",
        ),
    ]


def train(variant: str, args, bank: Bank, pairs: Bank, tokenizer, device: torch.device) -> tuple[TinyVTM, dict]:
    """The moving average of the weights, and the losses' means over the last tenth of the steps."""
    torch.manual_seed(args.seed)
    config = TinyVTMConfig(width=args.width, heads=args.heads, vocabulary=len(tokenizer))
    objectives = Objectives(TinyVTM(config, tokenizer).to(device), args.compile).to(device)
    kind, _, count = variant.partition("-")
    alone, steps = kind != "few", args.steps if kind != "few" else max(1, args.steps // 10)
    paired = bank if kind == "few" or count == "all" else pairs if count else None
    count = len(paired) if paired is bank else int(count or 0)
    optimizers = optimizers_of(list(objectives.named_parameters()), args, device)
    average = Average([objectives.model], args.ema)
    last, start = [], time.time()
    for step in range(steps):
        set_lr(optimizers, [args.muon_lr, args.lr], step, steps, min(args.warmup, steps), 0.6)
        losses = {}
        if alone:
            rows, other = torch.randint(len(bank), (2, args.batch), device=device)
            videos = augment(bank.videos[rows].float() / 255) * 2 - 1
            losses["reconstruction"] = objectives.reconstruction(videos)
            losses["words"] = objectives.masked_words(bank.tokens[other])
        if paired is not None:
            rows = torch.randperm(count, device=device)[: args.pair_batch]
            losses["contrast"] = objectives.paired(paired, rows)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(objectives.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        if step >= int(steps * 0.9):
            last.append({name: loss.detach() for name, loss in losses.items()})
    report = {name: round(float(torch.stack([part[name] for part in last]).mean()), 4) for name in last[0]}
    if not all(map(math.isfinite, report.values())):
        raise RuntimeError(f"{variant}: losses {report}: lower --muon_lr or --lr.")
    return average.modules[0].eval(), report | {"seconds": round(time.time() - start)}


def train_heads(alone: TinyVTM, pairs: Bank, args, device: torch.device) -> tuple[TinyVTM, dict]:
    """`alone` with new linear heads over its frozen towers, trained by the contrastive loss over the pairs."""
    torch.manual_seed(args.seed)
    model = TinyVTM(alone.config, alone.tokenizer).to(device)
    model.load_state_dict(alone.state_dict())
    for head in (model.video_projection, model.text_projection):
        head.reset_parameters()
    objectives = Objectives(model, compiled=False).to(device)
    with torch.no_grad():
        mask = pairs.tokens != model.tokenizer.pad_token_id
        videos = [
            model.encode_prepared(model.padded(part.float() / 255 * 2 - 1)).tokens[:, 0]
            for part in pairs.videos.split(512)
        ]
        video, text = torch.cat(videos), model.text.read(pairs.tokens, mask)[:, 0]
    parameters = [*model.video_projection.parameters(), *model.text_projection.parameters(), objectives.scale]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.1)
    for _ in range(args.head_steps):
        rows = torch.randperm(len(video), device=device)[: args.pair_batch]
        z, t = model.unit(model.video_projection(video[rows])), model.unit(model.text_projection(text[rows]))
        loss = objectives.contrast(z, t, same_caption(pairs.tokens[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval(), {"contrast": round(loss.item(), 4)}


def on(bank: Bank, device: torch.device, count: int | None = None) -> Bank:
    """Return the bank's first clips and captions on a device."""
    found = copy.copy(bank)
    found.videos, found.tokens = bank.videos[:count].to(device), bank.tokens[:count].to(device)
    return found


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer()
    variants = ["alone", *(f"joint-{n}" for n in (*args.pairs, "all")), *(f"frozen-{n}" for n in args.pairs), "few"]
    if unknown := set(args.variants or ()) - set(variants):
        raise SystemExit(f"--variants {', '.join(sorted(unknown))}: expected some of {', '.join(variants)}.")
    bank = Bank(args.bank_clips, tokenizer, device, args.seed)
    every_pair = pair_bank(max(args.pairs), args.seed, tokenizer)
    found = {}
    for variant in args.variants or variants:
        kind, _, count = variant.partition("-")
        pairs = on(every_pair, device, int(count) if count.isdigit() else None)
        if kind == "frozen":
            alone = found.get("alone") or TinyVTM.load(args.output / f"alone-{args.seed}").to(device)
            model, report = train_heads(alone, pairs, args, device)
        else:
            model, report = train(variant, args, bank, pairs, tokenizer, device)
        found[variant] = model
        folder = args.output / f"{variant}-{args.seed}"
        model.save(folder)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "output"}
        settings |= {"torch": torch.__version__, "variant": variant, "losses": report, "sha256": digest}
        (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        print(f"{folder.name}  {report}  sha256 {digest}", flush=True)


if __name__ == "__main__":
    main()
