"""Write the model card of an adapter or of fully trained denoisers, and upload both to the Hub.

TRL's card describes text generation and loads a language model, so this package has its own.
"""

import fnmatch
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .markdown import code, escape, one_line, target
from .run_files import CARD_MARK, OTHER_CARD, README, described

LORA = "pytorch_lora_weights.safetensors"
#: Globs under the folder of what `push_adapter` uploads: never a checkpoint, an optimizer state or an event file.
PATTERNS = (
    README,
    LORA,
    f"*/{LORA}",
    "*/adapter_model.safetensors",
    "*/adapter_config.json",
    "report.md",
    "samples/**/*.mp4",
    "samples/**/*.png",
    "samples/**/*.captions.txt",
    OTHER_CARD,  # as README.md
    "comfyui_lora*.safetensors",
    "original_lora*.safetensors",
)
_ADAPTERS = PATTERNS[1:4]
#: Also uploaded, if the folder's run has listed them: fully trained denoisers.
COMPONENTS = (
    "*/diffusion_pytorch_model*.safetensors",
    "*/diffusion_pytorch_model.safetensors.index.json",
    "*/config.json",
)
_EMBEDDED = Path(__file__).parent / "assets"
_SHOWN_VIDEOS = 4
_EXPORTS = "## Other formats"

_PISCES = """\
@inproceedings{pisces2026,
  title = {{PISCES}: Annotation-free Text-to-Video Post-Training via Optimal Transport-Aligned Rewards},
  booktitle = {ICML},
  year = {2026},
  eprint = {2602.01624},
  archivePrefix = {arXiv}
}"""


def model_card(
    base_model: str,
    trainer: str,
    pipeline_class: str,
    settings: dict,
    comparison: dict[str, dict[str, dict]] | None = None,
    folder: str | Path | None = None,
    repo_id: str | None = None,
    call: dict | None = None,
    guider_scale: float | None = None,
    tags: Sequence[str] = (),
    images: Sequence[str] = (),
    still: bool = False,
    dtype: str = "bfloat16",
    fps: int = 8,
    vae_tiling: bool = False,
    files: Sequence[str] | None = None,
    papers: Sequence[tuple[str, str]] = (),
    components: Mapping[str, str] | None = None,
) -> str:
    """Return the README.md of an adapter or of fully trained components: how to load it with plain diffusers, how it
    was trained, and what changed.

    Args:
        base_model: Hub id, folder or embedded name of the model that was trained. Of a folder only the last name is
            shown, since a card may be published.
        trainer: name of the method, for instance "Video GRPO".
        pipeline_class: name of the diffusers class, for instance "WanPipeline".
        settings: training settings, shown as a table in this order.
        comparison: {dataset: {score: {"n", "before", "after", "difference", "low", "high"}}}, as in report.json;
            None leaves the table out.
        folder: where the run was saved. Pictures and videos under its `samples/` are shown by relative path, and its
            layout decides how the snippet loads the adapter. None shows none.
        repo_id: repository that will hold the adapter, for the snippet; None writes a placeholder.
        call: more arguments of the pipeline's call for the snippet, for instance {"height": 64}.
        guider_scale: guidance_scale, if the pipeline's guider takes it and its call does not.
        tags: more tags, including those of the method.
        images: arguments of the pipeline's call that take an image, as in image-to-video.
        still: whether the pipeline makes images instead of videos.
        dtype: torch dtype in which the snippet loads the model.
        fps: frames per second of the file that the snippet writes.
        vae_tiling: whether the VAE decodes in tiles, which changes frames slightly.
        files: files in the folder that the card may mention, as relative paths; None means those that the run wrote
            (run_files.json) or, without that list, those that `PATTERNS` matches.
        papers: (arXiv id, title) of each source of the method; the card cites them after this library's paper.
        components: {component: class} of the fully trained components, saved in subfolders; empty for an adapter.

    Returns:
        Markdown with YAML front matter for the Hub.
    """
    folder = Path(folder) if folder is not None else None
    name = _shown_name(base_model)
    if folder is None:
        files = []
    elif files is None:
        files = [path.relative_to(folder).as_posix() for path in _uploaded(folder)]
    videos, sheets = _videos(folder, files), sorted(fnmatch.filter(files, "samples/before_after*.png"))
    use = _snippet(
        base_model,
        pipeline_class,
        repo_id,
        files,
        call or {},
        images,
        still,
        guider_scale,
        dtype,
        fps,
        vae_tiling,
        components or {},
    )
    task = f"{'image' if images else 'text'}-to-{'image' if still else 'video'}"
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys([*([] if components else ["lora"]), "pisces_rl", task, *tags])),
    }
    if _is_hub_id(base_model):
        front = {"base_model": base_model, "base_model_relation": "finetune" if components else "adapter"} | front
    if videos:
        front["widget"] = [{"text": one_line(prompt), "output": {"url": target(path)}} for path, prompt in videos]
    title, what = "LoRA trained", f"A LoRA adapter for {code(name)}, trained"
    if components:
        title = "fine-tuned"
        what = f"{' and '.join(map(code, components))} of {code(name)}, all weights trained"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---",
        f"# {escape(name)}, {title} with {escape(trainer)}",
        f"{what} {CARD_MARK} ({escape(trainer)}). Plain diffusers loads it.",
        f"## Use\n\n```python\n{use}\n```",
    ]
    if comparison:
        parts.append("## Before and after\n\n" + _evaluation(comparison))
    if sheets or videos:
        pictures = [f"![{escape(Path(path).stem.replace('_', ' '))}]({target(path)})" for path in sheets]
        links = "\n".join(f"- [{escape(prompt)}]({target(path)})" for path, prompt in videos)
        parts.append("\n\n".join(["## Samples", *pictures, *([links] if links else [])]))
    rows = [f"| {escape(key)} | {escape(value)} |" for key, value in settings.items() if value is not None]
    parts.append("\n".join(["## Training\n", "| setting | value |", "|---|---|", *rows]))
    if _exports(files):
        parts.append(_exports(files))
    parts.append("## Citation\n\n" + _citations(papers))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def describe_exports(folder: str | Path) -> None:
    """Update the model card of a folder's run, if there is one, with a list of the folder's other formats."""
    folder = Path(folder)
    section = _exports([path.relative_to(folder).as_posix() for path in _uploaded(folder)])
    for name in (README, OTHER_CARD):
        path = folder / name
        card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if CARD_MARK in card:
            rest = re.sub(rf"{_EXPORTS}\n.*?(?=^## )", "", card, flags=re.DOTALL | re.MULTILINE)
            before, citation, after = rest.rpartition("## Citation\n")
            path.write_text(before + (f"{section}\n\n" if section else "") + citation + after, encoding="utf-8")


def _exports(files: Sequence[str]) -> str:
    """Return the card's section on files that `export_adapter` wrote beside the adapter."""
    programs = {"comfyui": "ComfyUI, in `models/loras/`", "original": "programs that read the original checkpoint"}
    rows = [
        f"| {code(path)} | {program} |"
        for kind, program in programs.items()
        for path in sorted(fnmatch.filter(files, f"{kind}_lora*.safetensors"))
    ]
    if any(PurePosixPath(path).name == LORA for path in files):  # otherwise PEFT's files are the adapter itself
        rows += [
            f"| {code(path)} and its `adapter_config.json` | `PeftModel.from_pretrained` |"
            for path in sorted(fnmatch.filter(files, "*/adapter_model.safetensors"))
        ]
    return "\n".join([f"{_EXPORTS}\n", "| file | for |", "|---|---|", *rows]) if rows else ""


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload an adapter or fully trained components, with model card and samples, in one commit.

    Args:
        folder: where the trainer saved.
        repo_id: "name" or "namespace/name"; created if it does not exist.
        private: whether a new repository is private; None uses the account's default.
        token: Hub token; None uses the one that is logged in.
        commit_message: message of the commit.
        revision: branch, created if it does not exist; None means the main branch.
        allow_patterns: globs under the folder. None means `PATTERNS`; if the folder has a run_files.json, then also
            `COMPONENTS`, and only files that the run wrote. Checkpoints (`checkpoint-*`), earlier runs (`earlier-*`)
            and hidden files are never uploaded.
        endpoint: address of another Hub; None uses HF_ENDPOINT or the public one.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder holds no adapter, or repo_id is not a valid name. Nothing was sent.
        RuntimeError: the Hub refused or could not be reached. The files are still in the folder; the message says so.
    """
    folder = Path(folder)
    files = _uploaded(folder, allow_patterns)
    if not any(path.match(pattern) for path in _uploaded(folder) for pattern in (*_ADAPTERS, COMPONENTS[0])):
        raise ValueError(
            f"folder={str(folder)!r} holds no adapter: its run wrote neither pytorch_lora_weights.safetensors nor "
            "*/adapter_model.safetensors nor a trained component. Pass the output_dir of a run that has saved its "
            "model (trainer.save_model())."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id={repo_id!r} is not a repository name; allowed: 'name' or 'you/name'. {error}"
        ) from None
    names = {path: path.relative_to(folder).as_posix() for path in files}
    if folder / OTHER_CARD in names and OTHER_CARD in (described(folder) or ()):
        names = {path: name for path, name in names.items() if name != README} | {folder / OTHER_CARD: README}
    elif allow_patterns is None:  # nothing shows that it is ours
        names.pop(folder / OTHER_CARD, None)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for path, name in names.items()],
            commit_message=commit_message or "Upload adapter",
            revision=revision,
        )
    except Exception as error:  # the client's errors share no base class, and each gets the same advice
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(error).split())
        raise RuntimeError(
            f"the upload to {repo_id!r} failed ({_reason(status)}). Nothing is lost: the adapter, the model card and "
            f"the samples are in {str(folder)!r}. Try again with "
            f"pisces_rl.hub.push_adapter({str(folder)!r}, {repo_id!r}). "
            f"The Hub's client said: {type(error).__name__}: {said}"
        ) from error
    return str(commit.repo_url)


def _reason(status: int | None) -> str:
    known = {
        401: "401: no valid token; log in with `hf auth login`, or set hub_token",
        403: "403: the token may not write there; use one with write access, or your own namespace",
        404: "404: not found, or hidden from this token",
        409: "409: the repository changed meanwhile",
        429: "429: too many requests; wait a while",
    }
    if status is None:
        return "the Hub was not reached, or its client refused"
    return known.get(status, f"HTTP {status}")


def _uploaded(folder: Path, patterns: Sequence[str] | None = None) -> list[Path]:
    """Return the files that match a glob and are neither hidden nor in a checkpoint or an earlier run; without globs,
    those of `PATTERNS` and `COMPONENTS` that the folder's run wrote."""
    found, written = set(), described(folder) if patterns is None else None
    if patterns is None:
        patterns = PATTERNS if written is None else (*PATTERNS, *COMPONENTS)
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        parts = path.relative_to(folder).parts
        stays = any(part.startswith((".", "checkpoint-", "earlier-")) for part in parts)
        if path.is_file() and not stays and (written is None or "/".join(parts) in written):
            found.add(path)
    return sorted(found)


def _string(text: str) -> str:
    """Return a Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _is_plain(value: object) -> bool:
    """Return whether the value's repr is Python code."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _is_hub_id(base_model: str) -> bool:
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not base_model.startswith(".")
    return bool(looks) and not Path(base_model).exists()


def _shown_name(base_model: str) -> str:
    return base_model if _is_hub_id(base_model) else Path(base_model).name or base_model


def _snippet(
    base_model: str,
    pipeline_class: str,
    repo_id: str | None,
    files: Sequence[str],
    call: dict,
    images: Sequence[str],
    still: bool,
    guider_scale: float | None,
    dtype: str,
    fps: int,
    vae_tiling: bool,
    components: Mapping[str, str],
) -> str:
    own = _string(repo_id or ("you/this-model" if components else "you/this-adapter"))
    helpers = ([] if still else ["encode_video"]) + (["load_image"] if images else [])
    lines = ["import torch", f"from diffusers import {', '.join(sorted({pipeline_class, *components.values()}))}"]
    lines += [f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []
    name = _shown_name(base_model)
    if not _is_hub_id(base_model) and (_EMBEDDED / name).is_dir():
        lines.append("from pisces_rl.assets import asset_path  # the base model ships with pisces_rl")
        model, dtype = f'asset_path("{name}")', "float32"
    else:
        model = _string(base_model if _is_hub_id(base_model) else f"path/to/{name}")
    lines.append("")
    for component, its_class in components.items():
        lines.append(f'{component} = {its_class}.from_pretrained({own}, subfolder="{component}", dtype=torch.{dtype})')
    given = "".join(f", {component}={component}" for component in components)
    lines.append(f"pipe = {pipeline_class}.from_pretrained({model}{given}, dtype=torch.{dtype})")
    together, second, alone = (
        [path for path in sorted(files) if PurePosixPath(path).parts[-1] == file and path.count("/") == depth]
        for depth, file in ((0, LORA), (1, LORA), (1, "adapter_model.safetensors"))
    )
    experts = [path.split("/")[0] for path in second]
    peft_files = [] if together or second else alone
    if peft_files:
        lines = ["from peft import PeftModel", *lines]
        for component in (path.split("/")[0] for path in peft_files):
            load = f'PeftModel.from_pretrained(pipe.{component}, {own}, subfolder="{component}")'
            lines.append(f"pipe.{component} = {load}")
    elif components:
        pass  # the pipeline has them already
    elif not experts:
        lines.append(f"pipe.load_lora_weights({own})")
    else:  # name the file, since diffusers would guess
        if together:
            lines.append(f'pipe.load_lora_weights({own}, weight_name="{LORA}")')
        for name in experts:
            file = f'weight_name="{name}/{LORA}", load_into_{name}=True'
            lines.append(f"pipe.load_lora_weights({own}, {file})")
    if vae_tiling:
        lines.append("pipe.vae.enable_tiling()")
    if guider_scale is not None:
        lines.append(f"pipe.guider = pipe.guider.new(guidance_scale={guider_scale!r})")
    plain = {name: value for name, value in call.items() if _is_plain(value)}
    arguments = "".join(f", {name}={value!r}" for name, value in plain.items())
    if images:
        pictures = "".join(f', {name}=load_image("your_{name}.png")' for name in images)
        arguments = f"{pictures}{arguments}"
    prompt = 'prompt="your prompt"' if images else '"your prompt"'
    if still:
        lines.append(f'pipe({prompt}{arguments}).images[0].save("image.png")')
    else:
        lines.append(f"video = pipe({prompt}{arguments}).frames[0]")
        lines.append(f'encode_video(video, fps={fps}, output_path="video.mp4")  # needs PyAV: pip install av')
    return "\n".join(lines)


def _videos(folder: Path | None, files: Sequence[str]) -> list[tuple[str, str]]:
    """Return (relative path, prompt) of a few videos of the last evaluation in `files`."""
    videos = sorted(fnmatch.filter(files, "samples/step_*/*.mp4"))
    shown = []
    for path in [path for path in videos if path.split("/")[1] == videos[-1].split("/")[1]][:_SHOWN_VIDEOS]:
        stem, listed = PurePosixPath(path).stem, (Path(folder or "") / path).parent / "rewards.json"
        prompts = json.loads(listed.read_text(encoding="utf-8"))["prompts"] if listed.exists() else []
        row = int(stem) if stem.isdecimal() else len(prompts)
        shown.append((path, str(prompts[row]) if row < len(prompts) else stem))
    return shown


def _evaluation(comparison: dict[str, dict[str, dict]]) -> str:
    lines = ["| prompts | score | n | before | after | difference (95 % interval) |", "|---|---|---|---|---|---|"]
    for name, scores in comparison.items():
        for score, row in scores.items():
            if row.get("n"):
                lines.append(
                    f"| {escape(name)} | {escape(score)} | {row['n']} | {row['before']:.3f} | {row['after']:.3f} | "
                    f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] |"
                )
    lines += ["", "The same prompts and noise before and after; differences are paired, intervals bootstrapped."]
    return "\n".join(lines)


def _citations(papers: Sequence[tuple[str, str]]) -> str:
    """Return BibTeX of this library's paper, then of the methods' papers, each once."""
    cited = {"PISCES, whose optimal-transport rewards this library is built around": [_PISCES]}
    if papers:
        cited["The sources of the training method"] = [_bibtex(*paper) for paper in dict.fromkeys(papers)]
    return "\n\n".join(f"{why}:\n\n```bibtex\n" + "\n\n".join(entries) + "\n```" for why, entries in cited.items())


def _bibtex(arxiv: str, title: str) -> str:
    """Return a BibTeX entry; arXiv numbers begin with the year and month."""
    return (
        f"@misc{{arxiv{arxiv},\n  title = {{{{{title}}}}},\n  year = {{20{arxiv[:2]}}},\n"
        f"  eprint = {{{arxiv}}},\n  archivePrefix = {{arXiv}}\n}}"
    )
