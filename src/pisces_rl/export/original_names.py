"""What diffusers' modules are called in the checkpoints that models were published in, and in ComfyUI.

diffusers splits some of the original's projections (q, k and v of one weight) and orders some rows otherwise. `Part`
says which rows of the original weight a module of diffusers is. Sources: diffusers' converters of checkpoints
(loaders/single_file_utils.py, and convert_cogvideox_to_diffusers.py of its repository), and ComfyUI's models and
comfy/lora.py.
"""

import re
from dataclasses import dataclass

#: The layouts that `export_adapter` writes; "comfyui" and "original" use the names below.
FORMATS = ("diffusers", "peft", "comfyui", "original")


@dataclass(frozen=True)
class Part:
    """Which rows of an original weight a module's weight is.

    The original's rows are `of` equal chunks. The module's are `len(chunks)` equal chunks, and its i-th is the
    original's `chunks[i]`-th.
    """

    module: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1


@dataclass(frozen=True)
class Names:
    """Modules of diffusers (a regular expression that matches all of the name) and where they are in the original (a
    replacement)."""

    pattern: str
    original: str
    chunks: tuple[int, ...] = (0,)
    of: int = 1


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        classes: of diffusers' denoisers.
        original: names in the published checkpoint, below the prefix under which a checkpoint may keep the denoiser.
        comfyui: names in ComfyUI where they are others, or fewer are known.
        weight: what the original's reader has behind lora_A and lora_B.
        alpha: names of ComfyUI, as a regular expression that matches all of one, that get an `.alpha` in files for it;
            None: no name does.
    """

    classes: tuple[str, ...]
    original: tuple[Names, ...]
    comfyui: tuple[Names, ...] | None = None
    weight: str = ".weight"
    alpha: str | None = None

    def part(self, module: str, comfyui: bool) -> Part | None:
        """Where a module of diffusers is in the original, or in ComfyUI; None where that is not known."""
        for names in self.comfyui if comfyui and self.comfyui is not None else self.original:
            found = re.fullmatch(names.pattern, module)
            if found:
                return Part(found.expand(names.original), names.chunks, names.of)
        return None


def _qkv(pattern: str, original: str) -> tuple[Names, ...]:
    """q, k and v, "Q" in the pattern, that are one projection in the original."""
    return tuple(Names(pattern.replace("Q", letter), original, (i,), 3) for i, letter in enumerate("qkv"))


_ATTENTION_FF = r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"

_WAN = (
    Names(r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    Names(r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    Names(r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    Names(r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    Names(r"blocks\.(\d+)\.attn2\.add_([kv])_proj", r"blocks.\1.cross_attn.\2_img"),
    Names(r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    Names(r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    Names(r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    Names(r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    Names(r"condition_embedder\.time_proj", "time_projection.1"),
    Names(r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    Names(r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    Names(r"proj_out", "head.head"),
)

_HUNYUAN_DOUBLE, _HUNYUAN_SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_HUNYUAN_BLOCKS = (
    *_qkv(rf"{_HUNYUAN_DOUBLE}attn\.to_Q", r"double_blocks.\1.img_attn_qkv"),
    *_qkv(rf"{_HUNYUAN_DOUBLE}attn\.add_Q_proj", r"double_blocks.\1.txt_attn_qkv"),
    Names(rf"{_HUNYUAN_DOUBLE}attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    Names(rf"{_HUNYUAN_DOUBLE}attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    Names(rf"{_HUNYUAN_DOUBLE}ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    Names(rf"{_HUNYUAN_DOUBLE}ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    Names(rf"{_HUNYUAN_DOUBLE}ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    Names(rf"{_HUNYUAN_DOUBLE}ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
    Names(rf"{_HUNYUAN_DOUBLE}norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    Names(rf"{_HUNYUAN_DOUBLE}norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    # q, k, v and the feed-forward's first projection, of four times the width
    Names(rf"{_HUNYUAN_SINGLE}attn\.to_q", r"single_blocks.\1.linear1", (0,), 7),
    Names(rf"{_HUNYUAN_SINGLE}attn\.to_k", r"single_blocks.\1.linear1", (1,), 7),
    Names(rf"{_HUNYUAN_SINGLE}attn\.to_v", r"single_blocks.\1.linear1", (2,), 7),
    Names(rf"{_HUNYUAN_SINGLE}proj_mlp", r"single_blocks.\1.linear1", (3, 4, 5, 6), 7),
    Names(rf"{_HUNYUAN_SINGLE}proj_out", r"single_blocks.\1.linear2"),
    Names(rf"{_HUNYUAN_SINGLE}norm\.linear", r"single_blocks.\1.modulation.linear"),
)
_REFINER = r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\."
_REFINED = r"txt_in.individual_token_refiner.blocks.\1."
_HUNYUAN_REST = (
    *_qkv(rf"{_REFINER}attn\.to_Q", f"{_REFINED}self_attn_qkv"),
    Names(rf"{_REFINER}attn\.to_out\.0", f"{_REFINED}self_attn_proj"),
    Names(rf"{_REFINER}ff\.net\.0\.proj", f"{_REFINED}mlp.fc1"),
    Names(rf"{_REFINER}ff\.net\.2", f"{_REFINED}mlp.fc2"),
    Names(rf"{_REFINER}norm_out\.linear", f"{_REFINED}adaLN_modulation.1"),
    Names(r"context_embedder\.proj_in", "txt_in.input_embedder"),
    Names(r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    Names(r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    Names(r"context_embedder\.time_text_embed\.text_embedder\.linear_([12])", r"txt_in.c_embedder.linear_\1"),
    Names(r"time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    Names(r"time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    Names(r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    Names(r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    Names(r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    Names(r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    Names(r"norm_out\.linear", "final_layer.adaLN_modulation.1", (1, 0), 2),  # shift and scale
    Names(r"proj_out", "final_layer.linear"),
)

_LTX = (
    Names(rf"(transformer_blocks\.\d+\.{_ATTENTION_FF})", r"\1"),
    Names(r"(caption_projection\.linear_[12]|proj_out)", r"\1"),
    Names(r"proj_in", "patchify_proj"),
    Names(r"time_embed\.(.*)", r"adaln_single.\1"),
)

_LTX2_ATTENTION = r"(attn[12]|audio_attn[12]|audio_to_video_attn|video_to_audio_attn)\.(to_[qkv]|to_out\.0)"
_LTX2 = (
    Names(rf"(transformer_blocks\.\d+\.({_LTX2_ATTENTION}|(audio_)?ff\.net\.(0\.proj|2)))", r"\1"),
    Names(r"((audio_)?(caption_projection\.linear_[12]|proj_out))", r"\1"),
    Names(r"proj_in", "patchify_proj"),
    Names(r"audio_proj_in", "audio_patchify_proj"),
    Names(r"time_embed\.(.*)", r"adaln_single.\1"),
    Names(r"audio_time_embed\.(.*)", r"audio_adaln_single.\1"),
    Names(r"av_cross_attn_(video|audio)_scale_shift\.(.*)", r"av_ca_\1_scale_shift_adaln_single.\2"),
    Names(r"av_cross_attn_video_a2v_gate\.(.*)", r"av_ca_a2v_gate_adaln_single.\1"),
    Names(r"av_cross_attn_audio_v2a_gate\.(.*)", r"av_ca_v2a_gate_adaln_single.\1"),
)

_COG = r"transformer_blocks\.(\d+)\."
_COGVIDEOX = (
    *_qkv(rf"{_COG}attn1\.to_Q", r"transformer.layers.\1.attention.query_key_value"),
    Names(rf"{_COG}attn1\.to_out\.0", r"transformer.layers.\1.attention.dense"),
    Names(rf"{_COG}ff\.net\.0\.proj", r"transformer.layers.\1.mlp.dense_h_to_4h"),
    Names(rf"{_COG}ff\.net\.2", r"transformer.layers.\1.mlp.dense_4h_to_h"),
    Names(rf"{_COG}norm1\.linear", r"mixins.adaln_layer.adaLN_modulations.\1.1", (0, 1, 2, 6, 7, 8), 12),
    Names(rf"{_COG}norm2\.linear", r"mixins.adaln_layer.adaLN_modulations.\1.1", (3, 4, 5, 9, 10, 11), 12),
    Names(r"time_embedding\.linear_1", "time_embed.0"),
    Names(r"time_embedding\.linear_2", "time_embed.2"),
    Names(r"patch_embed\.text_proj", "mixins.patch_embed.text_proj"),
    Names(r"norm_out\.linear", "mixins.final_layer.adaLN_modulation.1"),
    Names(r"proj_out", "mixins.final_layer.linear"),
)
_COGVIDEOX_COMFYUI = (
    Names(rf"{_COG}attn1\.to_([qkv])", r"blocks.\1.\2"),
    Names(rf"{_COG}attn1\.to_out\.0", r"blocks.\1.attn_out"),
    Names(rf"{_COG}ff\.net\.0\.proj", r"blocks.\1.ff_proj"),
    Names(rf"{_COG}ff\.net\.2", r"blocks.\1.ff_out"),
    Names(rf"{_COG}norm([12])\.linear", r"blocks.\1.norm\2.linear"),
    Names(r"(time|ofs)_embedding\.linear_([12])", r"\1_embedding_linear_\2"),
    Names(r"(patch_embed\.text_proj|norm_out\.linear|proj_out)", r"\1"),
)

_MOCHI_BLOCK = r"transformer_blocks\.(\d+)\."
_MOCHI = (
    *_qkv(rf"{_MOCHI_BLOCK}attn1\.to_Q", r"blocks.\1.attn.qkv_x"),
    *_qkv(rf"{_MOCHI_BLOCK}attn1\.add_Q_proj", r"blocks.\1.attn.qkv_y"),
    Names(rf"{_MOCHI_BLOCK}attn1\.to_out\.0", r"blocks.\1.attn.proj_x"),
    Names(rf"{_MOCHI_BLOCK}attn1\.to_add_out", r"blocks.\1.attn.proj_y"),
    Names(rf"{_MOCHI_BLOCK}ff\.net\.0\.proj", r"blocks.\1.mlp_x.w1", (1, 0), 2),  # gate and value
    Names(rf"{_MOCHI_BLOCK}ff\.net\.2", r"blocks.\1.mlp_x.w2"),
    Names(rf"{_MOCHI_BLOCK}ff_context\.net\.0\.proj", r"blocks.\1.mlp_y.w1", (1, 0), 2),
    Names(rf"{_MOCHI_BLOCK}ff_context\.net\.2", r"blocks.\1.mlp_y.w2"),
    Names(rf"{_MOCHI_BLOCK}norm1\.linear", r"blocks.\1.mod_x"),
    Names(rf"{_MOCHI_BLOCK}norm1_context\.linear(_1)?", r"blocks.\1.mod_y"),
    Names(r"time_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    Names(r"time_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    Names(r"time_embed\.pooler\.(to_kv|to_q|to_out)", r"t5_y_embedder.\1"),
    Names(r"time_embed\.caption_proj", "t5_yproj"),
    Names(r"norm_out\.linear", "final_layer.mod", (1, 0), 2),
    Names(r"proj_out", "final_layer.linear"),
)

#: By name. SkyReels-V2 is Wan 2.1's architecture.
#:
#: Alphas, by the loaders of diffusers 0.42: Wan's applies those of its blocks and refuses others; those of
#: HunyuanVideo, LTX and LTX-2 refuse all, since each key must contain "lora". CogVideoX and Mochi have no converter in
#: diffusers, so ComfyUI alone reads their files.
FAMILIES = {
    "wan": Family(("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"), _WAN, alpha=r"blocks\..*"),
    "hunyuan_video": Family(("HunyuanVideoTransformer3DModel",), (*_HUNYUAN_BLOCKS, *_HUNYUAN_REST), _HUNYUAN_BLOCKS),
    "ltx": Family(("LTXVideoTransformer3DModel",), _LTX),
    "ltx2": Family(("LTX2VideoTransformer3DModel",), _LTX2),
    "cogvideox": Family(("CogVideoXTransformer3DModel",), _COGVIDEOX, _COGVIDEOX_COMFYUI, alpha=".*"),
    "mochi": Family(("MochiTransformer3DModel",), _MOCHI, weight="", alpha=".*"),
}
