"""ShapeMotion: synthetic captioned videos with known ground truth.

Flat shapes move on a plain background; prompts use 41 words; a verifier reads a clip back from its pixels and scores
it against its prompt on the dimensions of VBench that have an exact counterpart here. Used in tests, in the README's
first command, and to check other rewards.

    from pisces_rl.shapemotion import load_prompts, parse, render, shapemotion_reward, verify

    prompts = load_prompts("train", n=512, seed=0)                    # a datasets.Dataset with the column `prompt`
    videos = render([parse(p) for p in prompts["prompt"][:8]])        # (8, 17, 3, 64, 64) in [0, 1]
    verify(videos, prompts["prompt"][:8]).summary()                   # {"correct": 1.0, ...}
    shapemotion_reward(prompts=prompts["prompt"][:8], videos=videos)  # a reward for the trainers

| file | content |
|---|---|
| grammar.py | words, `Scene`, `Scene.prompt()`, `parse` |
| specs.py, layout.py, renderer.py | scenes as tensors, legal positions, pixels; on any device |
| splits.py, dataset.py | training and held-out prompts, prompts as a dataset |
| segmentation.py, tracks.py, quality.py, verifier.py | pixels -> colors -> objects -> scores |
| rewards.py | the verifier as reward functions |
| corruptions.py | clips with a single corruption |
"""

from .clip_quality import QUALITY
from .corruptions import SCENE_CORRUPTIONS, VIDEO_CORRUPTIONS, corrupt
from .dataset import Clips, load_prompts
from .grammar import VOCABULARY, Group, Scene, held_out, parse
from .layout import Layout, lay_out
from .renderer import render, render_layout
from .specs import SceneSpecs
from .splits import FAMILIES, SPLITS, family_of, sample_layouts, sample_scenes, split_of
from .verifier import ALIGNMENT, PASS, Verification, verify
from .verifier_rewards import (
    shapemotion_alignment,
    shapemotion_correct,
    shapemotion_product,
    shapemotion_quality,
    shapemotion_reward,
)

__all__ = [
    "ALIGNMENT",
    "FAMILIES",
    "PASS",
    "QUALITY",
    "SCENE_CORRUPTIONS",
    "SPLITS",
    "VIDEO_CORRUPTIONS",
    "VOCABULARY",
    "Clips",
    "Group",
    "Layout",
    "Scene",
    "SceneSpecs",
    "Verification",
    "corrupt",
    "family_of",
    "held_out",
    "lay_out",
    "load_prompts",
    "parse",
    "render",
    "render_layout",
    "sample_layouts",
    "sample_scenes",
    "shapemotion_alignment",
    "shapemotion_correct",
    "shapemotion_product",
    "shapemotion_quality",
    "shapemotion_reward",
    "split_of",
    "verify",
]
