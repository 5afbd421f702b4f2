"""Train tiny-vtm, the built-in video-text model, from scratch on ShapeMotion.

    python assets_src/train_tiny_vtm.py --output outputs/tiny-vtm --seed 2     # one GPU, about three minutes
    python assets_src/train_tiny_vtm.py --output outputs/judge --seed 100 --width 160 --heads 5
    python assets_src/train_tiny_vtm.py --output /tmp/x --smoke                # the same path on a CPU in seconds

1. bank: clips of the train split, with true captions and captions that are wrong in one attribute.
2. training: contrastive loss over the batch and one hard negative per clip, plus matching of the true caption against
   the hard negative and against another clip's caption, sampled by similarity. Captions that are true of another clip
   in the batch are not negatives. Clips get blur, shading and noise, as in a policy's samples.
3. The moving average is saved in fp16 with settings.json and scores.json; --keep also saves it after the given steps.
   `validation` in scores.json is the contrastive loss on held-out clips of the train split, by which a seed is chosen.
   Seeds 0 to 4 with --keep 300 1000, and their hashes: tiny_vtm_seeds*.json.

Only prompts and layouts of the train split are used.
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
from shapemotion_swaps import ATTRIBUTES, may_describe, swap
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from train_tiny_wan import Average, autocast, chunks, set_lr
from transformers import PreTrainedTokenizerFast

from pisces_rl.rewards.encoders import TinyVTM, TinyVTMConfig
from pisces_rl.shapemotion import VOCABULARY, Layout, SceneSpecs, render_layout, sample_layouts

MAX_FILE = 10 * 2**20
SWAPS = 4  # wrong captions per clip of the bank
SMOKE = {
    "bank_clips": 64,
    "steps": 3,
    "batch": 16,
    "warmup": 1,
    "score_clips": 32,
    "validation_clips": 32,
    "log_every": 1,
    "width": 48,
    "heads": 2,
}
SCORED_SPLITS = ("test_seen", "test_color_shape", "test_shape_motion")


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the trained model")
    add("--seed", type=int, default=0, help="seed of data, weights and batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--smoke", action="store_true", help="run a few steps on a few clips to test the script")
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--bank_clips", type=int, default=100_000)
    add("--steps", type=int, default=3000)
    add(
        "--seconds",
        type=float,
        default=math.inf,
        help="stop after this time; the learning-rate schedule still follows --steps",
    )
    add("--batch", type=int, default=768)
    add("--muon_lr", type=float, default=6e-3, help="matrices")
    add("--lr", type=float, default=1.5e-3, help="AdamW's learning rate, for parameters without Muon")
    add("--warmup", type=int, default=200)
    add("--ema", type=float, default=0.998)
    add("--keep", type=int, nargs="*", default=[], help="steps after which to save the average as well")
    add("--validation_clips", type=int, default=2048)
    add("--score_clips", type=int, default=1024, help="clips per split for scores.json")
    add("--log_every", type=int, default=100)
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per ShapeMotion word, lower case, between `<cls>` and `</s>`."""
    vocabulary = {word: i for i, word in enumerate((*VOCABULARY, "<cls>"))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<cls> $A </s>", special_tokens=[(word, vocabulary[word]) for word in ("<cls>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<cls>",
        model_max_length=TinyVTMConfig.max_text_tokens,
    )


class Bank:
    """Clips (n, 17, 3, 32, 32) as bytes, with token ids of their captions (n, L) and wrong captions (n, SWAPS, L)."""

    def __init__(self, count: int, tokenizer, device: torch.device, seed: int, split: str = "train"):
        generator = torch.Generator(device).manual_seed(seed)
        parts = [self._part(n, tokenizer, device, generator, split) for n in chunks(count, 4096)]
        specs, layouts, videos, tokens, wrong, kinds, valid = zip(*parts, strict=True)
        self.specs, self.layout = SceneSpecs.cat(specs), Layout.cat(list(layouts))
        self.videos, self.tokens, self.wrong = torch.cat(videos), torch.cat(tokens), torch.cat(wrong)
        self.kinds, self.valid = torch.cat(kinds), torch.cat(valid)

    def __len__(self) -> int:
        return len(self.videos)

    @staticmethod
    def _part(n: int, tokenizer, device: torch.device, generator: torch.Generator, split: str) -> tuple:
        specs, layout = sample_layouts(n, split, generator=generator)
        swapped = [swap(specs, generator, split=split) for _ in range(SWAPS)]
        videos = (render_layout(layout, size=TinyVTMConfig.resolution) * 255).round().byte()
        tokens = tokenise(tokenizer, specs).to(device)
        wrong = torch.stack([tokenise(tokenizer, other) for other, _, _ in swapped], 1).to(device)
        kinds, valid = (torch.stack([s[i] for s in swapped], 1) for i in (1, 2))
        return specs, layout.with_slots(3), videos, tokens, wrong, kinds, valid


def tokenise(tokenizer, specs: SceneSpecs) -> Tensor:
    prompts = [scene.prompt() for scene in specs.scenes()]
    length = TinyVTMConfig.max_text_tokens
    return tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def augment(videos: Tensor) -> Tensor:
    """Add blur, noise, brightness and tint of random strength per clip; (B, F, 3, H, W) in [0, 1]."""
    shape = (len(videos), 1, 1, 1, 1)

    def uniform(low: float, high: float, *of: int) -> Tensor:
        return low + (high - low) * torch.rand(of or shape, device=videos.device)

    padded = F.pad(videos.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, 1).unflatten(0, videos.shape[:2])
    videos = torch.lerp(videos, blurred, uniform(-0.5, 0.7).clamp(min=0))
    videos = videos + uniform(-0.06, 0.06).clamp(min=0) * torch.randn_like(videos)
    videos = videos * uniform(0.97, 1.03) + uniform(-0.02, 0.02, len(videos), 1, 3, 1, 1)
    return videos.clamp(0, 1)


class Batch:
    """Rows of a bank with one wrong caption each."""

    def __init__(self, bank: Bank, rows: Tensor, augmented: bool):
        videos = bank.videos[rows].float() / 255
        self.videos = (augment(videos) if augmented else videos) * 2 - 1
        pick = torch.randint(SWAPS, (len(rows),), device=rows.device)
        self.tokens, self.wrong = bank.tokens[rows], bank.wrong[rows, pick]
        self.valid = bank.valid[rows, pick]
        specs = bank.specs[rows]
        self.true = may_describe(specs, bank.layout[rows], specs)


class Losses(nn.Module):
    """Contrastive and matching losses of a model; a module, so that each tower compiles to one graph."""

    def __init__(self, model: TinyVTM, compiled: bool):
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.tensor(2.66))
        self.see, self.read, self.cross = self._see, model.text.read, self._cross
        if compiled:
            self.see, self.read, self.cross = (torch.compile(f) for f in (self.see, self.read, self.cross))

    def _see(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.encode_prepared(self.model.padded(videos))
        return features.tokens, features.pooled

    def _cross(self, hidden: Tensor, mask: Tensor, video: Tensor) -> Tensor:
        return self.model.matching_head(self.model.text.cross(hidden, mask, video)[:, 0]).float()

    def towers(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return video tokens and features, hidden states and masks of true and wrong captions, and their features."""
        video, z = self.see(batch.videos)
        tokens = torch.cat([batch.tokens, batch.wrong])
        mask = tokens != self.model.tokenizer.pad_token_id
        hidden = self.read(tokens, mask)
        pooled = F.normalize(self.model.text_projection(hidden[:, 0]).float(), dim=-1)
        return video, z, hidden, mask, *pooled.chunk(2)

    def contrast(self, batch: Batch, z: Tensor, own: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss, and the similarities (B, B) without false negatives."""
        scale = self.scale.exp().clamp(max=50)
        others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        similar = (scale * z @ own.T).masked_fill(batch.true & others, -1e4)
        hard = (scale * (z * wrong).sum(1)).masked_fill(~batch.valid, -1e4)
        target = torch.arange(len(z), device=z.device)
        of_videos = F.cross_entropy(torch.cat([similar, hard[:, None]], 1), target)
        return (of_videos + F.cross_entropy(similar.T, target)) / 2, similar

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of both losses and, for the log, (4,): each loss, pairs ranked right, captions found."""
        n = len(batch.videos)
        with autocast(batch.videos.device):
            video, z, hidden, mask, own, wrong = self.towers(batch)
        contrastive, similar = self.contrast(batch, z.float(), own, wrong)
        with torch.no_grad():
            eye = torch.eye(n, dtype=torch.bool, device=z.device)
            weights = similar.masked_fill(eye, -1e4).softmax(1) + 1e-9 * ~batch.true
            another = torch.multinomial(weights, 1)[:, 0]
        with autocast(batch.videos.device):
            hidden, mask = torch.cat([hidden, hidden[another]]), torch.cat([mask, mask[another]])
            logits = self.cross(hidden, mask, video.repeat(3, 1, 1))
        weight = torch.cat([torch.full_like(z[:, 0], 1.5), batch.valid.to(z), torch.full_like(z[:, 0], 0.5)]).float()
        target = (torch.arange(3 * n, device=z.device) < n).long()
        matching = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
        margin = logits[:, 1] - logits[:, 0]
        ranked = ((margin[:n] > margin[n : 2 * n]) & batch.valid).sum() / batch.valid.sum().clamp(min=1)
        found = (similar.argmax(1) == torch.arange(n, device=z.device)).float().mean()
        return contrastive / 2 + matching, torch.stack([contrastive, matching, ranked, found]).detach()


def train(args: argparse.Namespace, bank: Bank, tokenizer, device: torch.device) -> tuple[TinyVTM, dict]:
    """Train; return the average of the weights, and the averages kept by step."""
    torch.manual_seed(args.seed)
    config = TinyVTMConfig(width=args.width, heads=args.heads, vocabulary=len(tokenizer))
    losses = Losses(TinyVTM(config, tokenizer).to(device), args.compile).to(device)
    named = list(losses.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and min(p.shape) >= 32 and "embeddings" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers = [
        Muon(matrices, args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"),
    ]
    average = Average([losses.model], args.ema)
    start, total, kept = time.time(), 0.0, {}
    for step in range(args.steps):
        set_lr(optimizers, [args.muon_lr, args.lr], step, args.steps, args.warmup, 0.6)
        rows = torch.randint(len(bank), (args.batch,), device=device)
        loss, figures = losses(Batch(bank, rows, augmented=True))
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        total = total + figures
        if (step + 1) % args.log_every == 0:
            c, m, ranked, found = (total / args.log_every).tolist()
            if not math.isfinite(c + m):
                raise RuntimeError(f"a loss is {c}, {m} at step {step + 1}: lower --muon_lr or --lr.")
            print(
                f"{step + 1}/{args.steps}  contrastive {c:.4f}  matching {m:.4f}  ranked {ranked:.3f}  "
                f"found {found:.3f}  {time.time() - start:.0f} s",
                flush=True,
            )
            total = 0.0
        if step + 1 in args.keep:
            kept[step + 1] = copy.deepcopy(average.modules[0])
        if time.time() - start > args.seconds:
            break
    return average.modules[0].eval(), kept


@torch.no_grad()
def validation(model: TinyVTM, args: argparse.Namespace, tokenizer, device: torch.device) -> float:
    """Return the contrastive loss at scale 20 on unseen clips of the train split, in batches of 256."""
    bank = Bank(args.validation_clips, tokenizer, device, 10_000)
    losses = Losses(model, compiled=False).to(device)
    losses.scale.data.fill_(math.log(20))
    torch.manual_seed(0)
    values = []
    for rows in torch.arange(len(bank), device=device).split(256):
        batch = Batch(bank, rows, augmented=True)
        _, z, _, _, own, wrong = losses.towers(batch)
        values.append(losses.contrast(batch, z.float(), own, wrong)[0])
    return float(torch.stack(values).mean())


@torch.no_grad()
def scores(model: TinyVTM, args: argparse.Namespace, tokenizer, device: torch.device) -> dict:
    """Return, per split and attribute, how often the true caption scores above one with that attribute wrong."""
    losses = Losses(model, compiled=False).to(device)
    table = {}
    for split in SCORED_SPLITS:
        generator = torch.Generator(device).manual_seed(20_000)
        specs, layout = sample_layouts(args.score_clips, split, generator=generator)
        videos = render_layout(layout, size=model.config.resolution) * 2 - 1
        table[split] = {}
        for attribute in ATTRIBUTES:
            wrong, _, valid = swap(specs, generator, attribute, split)
            rows = valid.nonzero()[:, 0]
            if not len(rows):
                continue
            ranked = []
            for part in rows.split(256):
                video, z = losses.see(videos[part])
                pair = [tokenise(tokenizer, x[part]).to(device) for x in (specs, wrong)]
                values = []
                for tokens in pair:
                    mask = tokens != tokenizer.pad_token_id
                    hidden = losses.read(tokens, mask)
                    text = F.normalize(model.text_projection(hidden[:, 0]), dim=-1)
                    logits = losses.cross(hidden, mask, video)
                    values.append(torch.stack([logits[:, 1] - logits[:, 0], (z * text).sum(1)], 1))
                ranked.append((values[0] > values[1]).float())
            matching, cosine = torch.cat(ranked).mean(0).tolist()
            table[split][attribute] = {"n": len(rows), "matching": round(matching, 4), "cosine": round(cosine, 4)}
        print(split, {k: (v["matching"], v["cosine"]) for k, v in table[split].items()}, flush=True)
    return table


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer()
    start = time.time()
    bank = Bank(args.bank_clips, tokenizer, device, args.seed)
    print(f"bank of {len(bank)} clips  {time.time() - start:.0f} s", flush=True)
    model, kept = train(args, bank, tokenizer, device)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "seconds")}
    settings |= {"torch": torch.__version__, "seconds": round(time.time() - start)}
    if args.device == "cuda":
        settings["gpu"] = torch.cuda.get_device_name()
    for step, part in [*kept.items(), (None, model)]:
        folder = args.output if step is None else args.output.with_name(f"{args.output.name}-{step}")
        part.eval().save(folder)
        weights = folder / "model.safetensors"
        if weights.stat().st_size >= MAX_FILE:
            raise RuntimeError(f"{weights} has {weights.stat().st_size} bytes; the limit is {MAX_FILE}.")
        loss = validation(part, args, tokenizer, device)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        print(f"{folder.name}  validation {loss:.4f}  sha256 {digest}", flush=True)
        report = {"validation": round(loss, 4), "sha256": digest, "pairs": scores(part, args, tokenizer, device)}
        (folder / "scores.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        stopped = json.dumps(settings | {"stopped_at": step}, indent=1) + "\n"
        (folder / "settings.json").write_text(stopped, encoding="utf-8")


if __name__ == "__main__":
    main()
