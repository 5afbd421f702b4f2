"""Public reports on pipelines that were prepared for inference, and on modes that the caller left on."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from tiny_pipelines import BUILD, CALLS, quiet
from trainers.tiny_runs import brightness, logged, pipeline, prompts, trainer

from pisces_rl import VideoGRPOTrainer
from pisces_rl.policy import VideoPolicy


def refused(folder, pipe, message):
    with pytest.raises(ValueError, match=message):
        trainer(folder, model=pipe)


def test_a_compiled_transformer(tmp_path):
    """peft #2957, torch compiled model cannot have LoRA added without workaround: the error was a page of regex."""
    pipe = pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    refused(tmp_path, pipe, "transformer is already compiled; .*set torch_compile=True")


@pytest.mark.parametrize("compile", ["compile", "compile_repeated_blocks"])
def test_a_transformer_compiled_in_place(tmp_path, compile):
    """diffusers #9279, LoRA and compiled models: the graphs were made anew for every call, 33 s for two steps."""
    pipe = pipeline()
    getattr(pipe.transformer, compile)(backend="eager")
    refused(tmp_path, pipe, "transformer is already compiled")


def test_fused_projections(tmp_path):
    """diffusers #11903, fused QKV projections incompatible with training: adapters on to_q are never called."""
    pipe = pipeline()
    pipe.transformer.fuse_qkv_projections()
    refused(tmp_path, pipe, r"fused projections, .*call pipeline.transformer.unfuse_qkv_projections\(\)")
    pipe.transformer.unfuse_qkv_projections()
    trainer(tmp_path, model=pipe)


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.9),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe._current_timestep,
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_activations(tmp_path, kind):
    """Flow-Factory #196 and ParaAttention #15, step caching in training: backward went through a graph twice."""
    pipe = pipeline()
    pipe.transformer.enable_cache(CACHES[kind](pipe))
    refused(tmp_path, pipe, r"reuses activations .*call pipeline.transformer.disable_cache\(\)")
    pipe.transformer.disable_cache()
    trainer(tmp_path, model=pipe)


def test_offloading_of_accelerate(tmp_path):
    """diffusers #7448 and #10452, enable_model_cpu_offload cannot be undone: its hooks move weights in a run."""
    pipe, hook = pipeline(), None
    for name in ("text_encoder", "transformer", "vae"):
        _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
    refused(tmp_path, pipe, r"is offloaded by accelerate \(CpuOffload\): .*list .* in the trainer's offload=")


def test_sequential_offloading(tmp_path):
    """kohya sd-scripts #1454 and many more, cannot copy out of meta tensor; no data!: nobody says which, and why."""
    pipe = pipeline()
    cpu_offload(pipe.transformer, torch.device("cpu"))
    refused(tmp_path, pipe, "transformer is offloaded by accelerate")


def test_offloading_in_groups(tmp_path):
    """diffusers #11791, LoRA and group offloading: a run ended with 'cannot pickle module' when it was to be saved."""
    pipe = pipeline()
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    refused(tmp_path, pipe, "transformer is offloaded in groups")


def test_our_own_offloading_may_come_again(tmp_path):
    """The refusals do not meet what the trainer itself does: a pipeline serves a second one."""
    pipe = pipeline()
    trainer(tmp_path, model=pipe, offload=["text_encoder", "vae"])
    VideoPolicy(pipe, num_inference_steps=3, pipeline_kwargs=CALLS["wan"])


def test_weights_in_eight_bits(tmp_path):
    """diffusers #10685, LoRA and fp8 layerwise casting: the run was trained, and failed when its file was checked."""
    pipe = pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    made = trainer(tmp_path, model=pipe, max_steps=1)
    made.train()
    made.save_model()
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists() and logged(made, "grad_norm")[0] > 0


def test_a_pipeline_from_inference_mode(tmp_path):
    """diffusers #1658, inference tensors cannot be saved for backward: said at the first backward, of no tensor."""
    with torch.inference_mode():
        pipe = quiet(BUILD["wan"]())
    refused(tmp_path, pipe, r"was created inside torch.inference_mode\(\), .*load the pipeline outside")


def test_evaluation_in_inference_mode(tmp_path):
    """trl #2983, the same: what was evaluated first is trained on as if it had not been."""
    settings = {"eval_dataset": prompts(1), "eval_on_start": False, "num_sample_videos": 0, "max_steps": 1}
    made, plain = (trainer(tmp_path / name, **settings) for name in "ab")
    with torch.inference_mode():
        measured = made.evaluate()
    assert measured == plain.evaluate()
    for one in (made, plain):
        one.train()
    assert logged(made, "grad_norm") == logged(plain, "grad_norm")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_training_in_the_callers_mode(tmp_path, mode):
    """diffusers #1658, too: a notebook's decorator around it all."""
    made = trainer(tmp_path, max_steps=1)
    with mode():
        made.train()
    assert logged(made, "grad_norm")[0] > 0


def test_a_reward_in_inference_mode(tmp_path):
    """unsloth #2434, GRPO and inference tensors: rewards are models, and models run in inference mode."""
    made = trainer(tmp_path, torch.inference_mode()(brightness), max_steps=1)
    made.train()
    assert logged(made, "grad_norm")[0] > 0


def test_free_init():
    """diffusers #6315, FreeInit: the pipeline samples several times in one call."""
    pipe = quiet(BUILD["animatediff"]())
    pipe.enable_free_init(num_iters=2)
    policy = VideoPolicy(pipe, num_inference_steps=2, pipeline_kwargs=CALLS["animatediff"])
    with pytest.raises(ValueError, match="sets its timesteps again after 2 scheduler steps"):
        policy.sample(["a"], noise_seeds=[0])


def test_half_precision_weights(tmp_path):
    """diffusers #8871, attempting to unscale FP16 gradients: adapters on an fp16 base are fp32, gradients finite."""
    made = trainer(tmp_path, model=pipeline().to(torch.float16), max_steps=1)
    made.train()
    assert {p.dtype for p in made.adapter.values()} == {torch.float32}
    assert 0 < logged(made, "grad_norm")[0] < 1


def test_passed_modules_in_training_mode(tmp_path):
    """diffusers #9660, from_pretrained does not set the passed modules' mode to evaluation."""
    pipe = BUILD["wan"]()
    for name in ("text_encoder", "transformer", "vae"):
        getattr(pipe, name).train()
    VideoGRPOTrainer(pipe, brightness, trainer(tmp_path / "other").args, prompts())
    assert not any(getattr(pipe, name).training for name in ("text_encoder", "transformer", "vae"))
