"""Train tiny-wan, the built-in text-to-video model, from scratch on ShapeMotion.

    python assets_src/train_tiny_wan.py --output outputs/tiny-wan      # one GPU, about ten minutes
    python assets_src/train_tiny_wan.py --output /tmp/x --smoke        # the same path on a CPU in seconds

1. vae: AutoencoderKLWan on rendered clips. The decoder is trained on noisy latents, so that it tolerates small errors
   of the transformer; the loss weights objects nine times as much as the background.
2. bank: clips of the train split, encoded once and normalized by their mean and standard deviation.
3. transformer: flow matching, v = noise - x0, on the bank; a tenth of the captions is dropped for guidance.
4. The moving averages are saved in fp16 as a plain `WanPipeline` folder, with settings.json and, by
   benchmarks/tiny_wan_scores.py, scores.json.

Only prompts and layouts of the train split are used. The same seed and settings on the same machine give the same data
and initial weights; results differ in the last digits, since GPU kernels are not deterministic.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import whole_clip_vae
from diffusers import AutoencoderKLWan
from muon import Muon
from safetensors import safe_open
from tiny_wan_model import (
    LATENT_CHANNELS,
    MAX_TOKENS,
    SHIFT,
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from torch import Tensor, nn

from pisces_rl.shapemotion import render_layout, sample_layouts
from pisces_rl.shapemotion.renderer import BACKGROUND_RGB

MAX_FILE = 16 * 2**20
LOG_VARIANCE = -6.0
SMOKE = {
    "vae_steps": 2,
    "vae_batch": 2,
    "stat_clips": 4,
    "bank_clips": 8,
    "steps": 3,
    "batch": 4,
    "warmup": 1,
    "layouts": 8,
    "score_clips": 2,
    "log_every": 1,
}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the trained pipeline; an existing pipeline is replaced")
    add("--vae", type=Path, help="folder of a trained AutoencoderKLWan; skips the first stage")
    add("--seed", type=int, default=1, help="seed of data, weights and noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="compile blocks")
    add("--smoke", action="store_true", help="run a few steps on a few clips to test the script")
    add("--layouts", type=int, default=4096, help="layouts drawn at once")
    add("--log_every", type=int, default=250, help="steps between lines")
    add("--score_clips", type=int, default=256, help="prompts per split for scores.json; 0 skips it")
    vae = parser.add_argument_group("vae").add_argument
    vae("--vae_steps", type=int, default=1589)
    vae("--vae_batch", type=int, default=128)
    vae("--vae_muon_lr", type=float, default=6e-3, help="kernels")
    vae("--vae_lr", type=float, default=3e-3, help="biases, by AdamW")
    vae(
        "--vae_noise",
        type=float,
        default=0.15,
        help="noise on the decoder's input, in standard deviations of the latents",
    )
    vae("--vae_kl", type=float, default=1e-3, help="weight of the latents' mean square")
    vae("--vae_ema", type=float, default=0.998)
    vae("--stat_clips", type=int, default=4096, help="clips to measure the latents' mean and standard deviation on")
    dit = parser.add_argument_group("transformer and text encoder").add_argument
    dit("--bank_clips", type=int, default=220_000)
    dit("--steps", type=int, default=5614)
    dit("--batch", type=int, default=1024)
    dit("--muon_lr", type=float, default=7e-3, help="matrices")
    dit("--lr", type=float, default=2e-3, help="AdamW's learning rate, for parameters without Muon")
    dit("--warmup", type=int, default=200)
    dit("--ema", type=float, default=0.9995)
    dit("--caption_dropout", type=float, default=0.1)
    args = parser.parse_args(arguments)
    if args.smoke:
        vars(args).update(SMOKE)
    return args


class Clips:
    """An endless, seeded stream of rendered training clips.

    Args:
        device: the device to render on.
        seed: seed of the stream.
        layouts: number of layouts drawn at once, from which batches are rendered.
    """

    def __init__(self, device: torch.device, seed: int, layouts: int):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.layouts, self.at = layouts, layouts

    def draw(self, n: int) -> tuple[Tensor, Tensor, object]:
        """Return clips (n, 3, 17, 64, 64) and background colors (n, 3), both in [-1, 1], and the scenes' specs."""
        if self.at + n > self.layouts:
            self.specs, self.layout = sample_layouts(max(n, self.layouts), "train", generator=self.generator)
            self.at = 0
        rows = slice(self.at, self.at + n)
        self.at += n
        layout = self.layout[rows]
        videos = render_layout(layout).transpose(1, 2) * 2 - 1
        background = BACKGROUND_RGB.to(videos.device)[layout.background] * 2 - 1
        return videos.contiguous(memory_format=torch.channels_last_3d), background, self.specs[rows]


def autocast(device: torch.device):
    """Return autocast to bf16 on CUDA, and no autocast on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Average:
    """Exponential moving average of modules; after n early steps, it averages over about n / 10 steps."""

    def __init__(self, modules: list[nn.Module], decay: float):
        self.modules = [copy.deepcopy(module).requires_grad_(False) for module in modules]
        self.target = [p for module in self.modules for p in module.parameters()]
        self.source = [p for module in modules for p in module.parameters()]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        torch._foreach_lerp_(self.target, self.source, 1 - min(self.decay, self.steps / (self.steps + 9)))


def set_lr(optimizers: list, peaks: list[float], step: int, steps: int, warmup: int, decay: float) -> None:
    """Learning-rate schedule: linear warm-up, constant, then linear to 2 % over the last `decay` of the steps."""
    factor = min(1, (step + 1) / warmup) * (0.02 + 0.98 * min(1.0, (1 - step / steps) / decay))
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


# --- 1. the VAE ------------------------------------------------------------------------------------------------------


def vae_loss(
    vae: AutoencoderKLWan, videos: Tensor, background: Tensor, noise: float, kl: float
) -> tuple[Tensor, Tensor]:
    """Return (loss, L2): the loss is the weighted L1 + L2 of the reconstruction plus kl * mean(mu^2)."""
    with torch.no_grad():
        object_ = ((videos - background[:, :, None, None, None]).abs().amax(1, keepdim=True) > 0.04).float()
        weight = 1 + 8 * F.max_pool3d(object_, (1, 5, 5), 1, (0, 2, 2))
    with autocast(videos.device):
        mean = whole_clip_vae.encode(vae, videos)[:, :LATENT_CHANNELS].float()
        deviation = mean.detach().std((0, 2, 3, 4), keepdim=True)
        decoded = whole_clip_vae.decode(vae, mean + noise * deviation * torch.randn_like(mean)).float()
    error = decoded - videos
    l1 = (weight * error.abs()).sum() / (3 * weight.sum())
    l2 = (weight * error.square()).sum() / (3 * weight.sum())
    return l1 + l2 + kl * mean.square().mean(), l2.detach()


def train_vae(args: argparse.Namespace, device: torch.device) -> AutoencoderKLWan:
    """Train the VAE; return its average, with the latents' statistics in its config and a small fixed variance."""
    torch.manual_seed(args.seed)
    vae = whole_clip_vae.channels_last(build_vae().to(device))
    kernels = [p for p in vae.parameters() if p.ndim > 1]
    biases = [p for p in vae.parameters() if p.ndim == 1]
    optimizers = [Muon(kernels, args.vae_muon_lr), torch.optim.AdamW(biases, betas=(0.9, 0.98), weight_decay=0.0)]
    average = Average([vae], args.vae_ema)
    clips = Clips(device, args.seed, args.layouts)
    start = time.time()
    for step in range(args.vae_steps):
        set_lr(optimizers, [args.vae_muon_lr, args.vae_lr], step, args.vae_steps, min(20, args.vae_steps), 0.5)
        videos, background, _ = clips.draw(args.vae_batch)
        loss, l2 = vae_loss(vae, videos, background, args.vae_noise, args.vae_kl)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        if (step + 1) % args.log_every == 0:
            print(f"vae {step + 1}/{args.vae_steps}  L2 {l2.item():.5f}  {time.time() - start:.0f} s", flush=True)
    vae = average.modules[0]
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:].zero_()
        vae.quant_conv.bias[LATENT_CHANNELS:].fill_(LOG_VARIANCE)
    latents = torch.cat([encode_clips(vae, clips, n)[0] for n in chunks(args.stat_clips, 256)])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    return vae


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Clips, n: int) -> tuple[Tensor, object]:
    """Return (n, 16, 5, 8, 8) unscaled fp32 latents of fresh clips, and their specs."""
    videos, _, specs = clips.draw(n)
    with autocast(videos.device):
        return whole_clip_vae.encode(vae, videos)[:, :LATENT_CHANNELS].float(), specs


def chunks(total: int, size: int) -> list[int]:
    return [min(size, total - done) for done in range(0, total, size)]


# --- 2. the bank -----------------------------------------------------------------------------------------------------


def make_bank(
    args: argparse.Namespace, vae: AutoencoderKLWan, tokenizer, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return (n, 16, 5, 8, 8) normalized latents, in bf16 on CUDA, and (n, 24) token ids."""
    start = time.time()
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(shape)
    clips = Clips(device, args.seed + 1, args.layouts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    latents, tokens = [], []
    for n in chunks(args.bank_clips, 512):
        encoded, specs = encode_clips(vae, clips, n)
        latents.append(((encoded - mean) / deviation).to(dtype))
        tokens.append(tokenise(tokenizer, [scene.prompt() for scene in specs.scenes()]))
    print(f"bank of {args.bank_clips} clips  {time.time() - start:.0f} s", flush=True)
    return torch.cat(latents), torch.cat(tokens).to(device)


def tokenise(tokenizer, prompts: list[str]) -> Tensor:
    """Return (n, 24) token ids, as WanPipeline creates them."""
    padded = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids


# --- 3. the transformer ----------------------------------------------------------------------------------------------


def sample_sigma(n: int, device: torch.device) -> Tensor:
    """Draw (n,) sigmas in (0, 1): half uniform, half logit-normal, then shifted as by the scheduler."""
    uniform, normal = torch.rand(n, device=device), torch.randn(n, device=device).sigmoid()
    u = torch.where(torch.rand(n, device=device) < 0.5, uniform, normal)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def flow_loss(transformer: nn.Module, text_encoder: nn.Module, latents: Tensor, tokens: Tensor) -> Tensor:
    """Return mean |v - (noise - x0)|^2 at x = (1 - sigma) x0 + sigma noise."""
    sigma = sample_sigma(len(latents), latents.device)
    s, noise = sigma.view(-1, 1, 1, 1, 1), torch.randn_like(latents)
    mask = (tokens > 0).long()
    with autocast(latents.device):
        # zero the encoder's output at padding, as the pipeline does
        text = text_encoder(tokens, mask).last_hidden_state * mask[..., None]
        v = transformer((1 - s) * latents + s * noise, sigma * 1000, text, return_dict=False)[0]
    return (v.float() - (noise - latents)).square().mean()


def train_transformer(args: argparse.Namespace, bank: tuple[Tensor, Tensor], tokenizer) -> tuple[nn.Module, nn.Module]:
    """Train; return the averages of the transformer and the text encoder."""
    latents, tokens = bank
    device = latents.device
    torch.manual_seed(args.seed + 2)
    transformer, text_encoder = build_transformer().to(device), build_text_encoder().to(device)
    named = [*transformer.named_parameters(), *text_encoder.named_parameters()]
    others = ("shared", "embed_tokens", "relative", "proj_out")
    matrices = [p for n, p in named if p.ndim == 2 and min(p.shape) >= 32 and not any(word in n for word in others)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers = [
        Muon(matrices, args.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"),
    ]
    average = Average([transformer, text_encoder], args.ema)
    if args.compile:
        transformer.compile_repeated_blocks()
    empty = tokenise(tokenizer, [""]).to(device)
    start, total = time.time(), 0.0
    for step in range(args.steps):
        set_lr(optimizers, [args.muon_lr, args.lr], step, args.steps, args.warmup, 0.6)
        rows = torch.randint(len(latents), (args.batch,), device=device)
        dropped = torch.rand(args.batch, 1, device=device) < args.caption_dropout
        loss = flow_loss(transformer, text_encoder, latents[rows].float(), torch.where(dropped, empty, tokens[rows]))
        loss.backward()
        nn.utils.clip_grad_norm_(average.source, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        total = total + loss.detach()
        if (step + 1) % args.log_every == 0:
            mean = float(total) / args.log_every
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} at step {step + 1}: lower --muon_lr or --lr.")
            print(f"transformer {step + 1}/{args.steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)
            total = 0.0
    return average.modules[0], average.modules[1]


# --- 4. saving -------------------------------------------------------------------------------------------------------


def save(args: argparse.Namespace, text_encoder, vae, transformer, seconds: float) -> None:
    """Save a plain fp16 pipeline folder; raise an error for files that are too large or values that are not finite."""
    parts = [module.cpu().half().eval() for module in (text_encoder, vae, transformer)]
    for module in parts:
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
    staging = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    build_pipeline(build_tokenizer(), *parts).save_pretrained(staging, safe_serialization=True)
    for path in (staging / "model_index.json", staging / "tokenizer" / "tokenizer_config.json"):
        # the class name that all versions of transformers 5 know
        text = path.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
        path.write_text(text, encoding="utf-8")
    for path in staging.rglob("*.safetensors"):
        if path.stat().st_size >= MAX_FILE:
            raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes; the limit is {MAX_FILE}.")
        with safe_open(str(path), "pt") as file:
            if not all(torch.isfinite(file.get_tensor(key).float()).all() for key in file.keys()):
                raise RuntimeError(f"{path.name} holds values that are not finite in fp16.")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("output", "vae")}
    settings |= {"seconds": round(seconds), "torch": torch.__version__, "vae_trained_here": args.vae is None}
    if args.device == "cuda":
        settings["gpu"] = torch.cuda.get_device_name()
    (staging / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if args.output.exists():
        if not (args.output / "model_index.json").exists():
            raise RuntimeError(f"--output {args.output} exists and is not a pipeline; the result is in {staging}.")
        shutil.rmtree(args.output)
    staging.rename(args.output)
    print(f"saved {args.output}", flush=True)


def main(arguments=None) -> None:
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    start = time.time()
    if args.vae is None:
        vae = train_vae(args, device)
    else:
        vae = AutoencoderKLWan.from_pretrained(args.vae, dtype=torch.float32).to(device).requires_grad_(False)
        whole_clip_vae.channels_last(vae)
    tokenizer = build_tokenizer()
    bank = make_bank(args, vae, tokenizer, device)
    transformer, text_encoder = train_transformer(args, bank, tokenizer)
    save(args, text_encoder, vae, transformer, time.time() - start)
    if args.score_clips:
        script = Path(__file__).parents[1] / "benchmarks" / "tiny_wan_scores.py"
        command = [sys.executable, str(script), "--model", str(args.output), "--n", str(args.score_clips)]
        command += ["--json", str(args.output / "scores.json"), "--device", args.device]
        subprocess.run(command + (["--steps", "2", "--guidance", "1"] if args.smoke else []), check=True)


if __name__ == "__main__":
    main()
