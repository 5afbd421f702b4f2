"""`peft_config="full"`: all weights of the denoisers, on tiny real pipelines."""

import copy
import json

import numpy as np
import pytest
import test_backprop_trainer as backprop
import tiny_runs
import torch
from accelerate.utils import DeepSpeedPlugin
from datasets import Dataset
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from fake_hub import running_hub
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_consistency import Videos
from tiny_pipelines import BUILD, CALLS, CONDITIONS, quiet
from tiny_runs import largest_difference, logged, prompts, trainer, weights
from torch import Tensor

from pisces_rl import ConsistencyDistillation, RewardBackpropTrainer
from pisces_rl.hub import push_adapter
from pisces_rl.trainers.base.distributed import gradients

SGD = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
CLASSES = {"wan": WanTransformer3DModel, "cogvideox": CogVideoXTransformer3DModel}


def full(folder, family="wan", **settings):
    """A trainer of all weights of a family's tiny pipeline, at the size of that family's call."""
    own = {}
    if family != "wan":
        call = dict(CALLS[family])
        own = {name: call.pop(name, None) for name in ("height", "width", "num_frames", "guidance_scale")}
        own["pipeline_kwargs"] = call
    return trainer(
        folder,
        model=settings.pop("model", None) or quiet(BUILD[family]()),
        peft_config="full",
        **own | {"max_steps": 2} | SGD | settings,
    )


def latents(pipeline, made) -> Tensor:
    """What a pipeline makes of one prompt from fixed noise, by diffusers alone."""
    call = {"num_inference_steps": 2} | made.policy.pipeline_kwargs
    return pipeline(prompt=["clip 0"], generator=torch.Generator().manual_seed(1), output_type="latent", **call)[0]


# --- what is trained ---


class OutputGradients:
    """Of each of a denoiser's calls with a graph: its inputs, and the gradient of its output."""

    def __init__(self, denoiser):
        self.calls = []
        denoiser.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, denoiser, args, kwargs, output):
        (sample,) = output if isinstance(output, tuple) else output.values()
        if sample.requires_grad:
            call = [args, kwargs, None]
            self.calls.append(call)
            sample.register_hook(lambda gradient: call.__setitem__(2, gradient.clone()))


@pytest.mark.parametrize("family", CLASSES)
def test_the_gradient_is_that_of_autograd_on_the_denoiser(family, tmp_path):
    """One GRPO step: the optimizer gets, for every weight, the products of autograd on a copy of the denoiser."""
    kept = tiny_runs.Gradients()
    made = full(tmp_path, family, max_steps=1, callbacks=[kept], gradient_checkpointing=True)
    denoiser = made.pipeline.transformer
    before = copy.deepcopy(denoiser)
    before.disable_gradient_checkpointing()
    seen = OutputGradients(denoiser)
    made.train()
    (step,) = kept.steps
    parameters = dict(before.named_parameters())
    assert {f"denoiser.transformer.{name}" for name in parameters} == set(step)
    for args, kwargs, gradient in seen.calls:
        before(*args, **kwargs)[0].backward(gradient)
    assert len(seen.calls) >= 2
    largest = max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None)
    for name, parameter in parameters.items():
        own, expected = step[f"denoiser.transformer.{name}"], parameter.grad
        expected = torch.zeros_like(own) if expected is None else expected
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-6 * largest), name


def test_weights_move_and_there_is_no_adapter(tmp_path):
    made = full(tmp_path)
    before = weights(made)
    assert set(before) == {f"transformer.{name}" for name, _ in made.pipeline.transformer.named_parameters()}
    assert not any(isinstance(module, BaseTunerLayer) for module in made.pipeline.transformer.modules())
    frozen = [made.pipeline.vae, made.pipeline.text_encoder]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    made.train()
    moved = [name for name, value in weights(made).items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_a_bf16_pipeline_trains_in_fp32(tmp_path):
    """Steps of 1e-7 are kept, which bf16 would round away; the text encoder stays in bf16, and the card loads so."""
    pipe = tiny_runs.pipeline().to(torch.bfloat16)
    made = full(tmp_path, model=pipe, bf16=True, learning_rate=1e-6, max_steps=1, optim="adamw_torch")
    before = weights(made)
    made.train()
    moved = largest_difference(weights(made), before)
    assert {p.dtype for p in made.adapter.values()} == {torch.float32} and 1e-7 < moved < 1e-5
    assert pipe.text_encoder.dtype == torch.bfloat16
    made.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "dtype=torch.bfloat16" in card and "all weights of transformer, saved in float32" in card
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name.removeprefix("transformer.")], value) for name, value in weights(made).items())


def test_one_expert_of_wan22_trains(tmp_path):
    pipe = quiet(BUILD["wan22_a14b"]())
    made = full(tmp_path, model=pipe, lora_denoisers=["transformer_2"])
    assert {name.split(".")[0] for name in made.adapter} == {"transformer_2"}
    assert not any(p.requires_grad for p in pipe.transformer.parameters())
    made.save_model()
    assert (tmp_path / "transformer_2" / "config.json").exists() and not (tmp_path / "transformer").exists()


@pytest.mark.slow
def test_rewards_are_backpropagated_together_with_consistency_distillation(tmp_path):
    """The other trainer, whose auxiliary loss takes the copy of the initial weights as its teacher."""
    settings = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 3e-3}
    made = RewardBackpropTrainer(
        tiny_runs.pipeline(),
        backprop.bright,
        backprop.config(tmp_path, **settings),
        prompts(2),
        peft_config="full",
        auxiliary_losses=[ConsistencyDistillation(Videos(), weight=1e-6, steps=4)],
    )

    def reward() -> float:  # from the same noise
        samples = made.policy.sample(["clip 0", "clip 1"], noise_seeds=[0, 1])
        return float(backprop.bright(samples.prompts, samples.videos).mean())

    before, first = weights(made), reward()
    made.train()
    distilled = logged(made, "consistency_loss")
    assert reward() > first + 1e-3 and len(distilled) == 6 and all(np.isfinite(distilled))
    with made.initial.reference():
        assert largest_difference(weights(made), before) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mochi", "hunyuan15", "t2v_sd", "wan22_a14b", "cogvideox_i2v", "wan_i2v", "sd3"])
def test_other_families(family, tmp_path):
    """Two steps of NFT with a reference, saved and reloaded: UNets, epsilon- and v-prediction, experts, images."""
    pictures = CONDITIONS[family].get("image", [])[:2]
    data = Dataset.from_dict({"prompt": ["clip 0", "clip 1"], **({"image": pictures} if pictures else {})})
    made = full(tmp_path, family, data=data, method="nft", beta=0.3, per_device_train_batch_size=2, num_generations=2)
    before = weights(made)
    made.train()
    made.save_model()
    after = weights(made)
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(moved) > 0.75 * len(before) and {name.split(".")[0] for name in moved} == set(made.trained.modules)
    assert logged(made, "velocity/reference_distance")[-1] > 0


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradient(tmp_path):
    """As graphs, without the compiler behind them."""
    runs = {}
    for compiled in (False, True):
        keeps = tiny_runs.Gradients()
        more = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        full(tmp_path / str(compiled), max_steps=1, callbacks=[keeps], **more).train()
        (runs[compiled],) = keeps.steps
    scale = max(float(g.abs().max()) for g in runs[False].values())
    assert largest_difference(runs[False], runs[True]) < 1e-4 * scale


# --- the reference ---


def test_the_reference_of_grpo_is_the_initial_pipeline(tmp_path):
    """With a KL term; afterwards the trained weights are there again, to the bit."""
    made = full(tmp_path, beta=0.1, max_steps=3)
    expected = latents(tiny_runs.pipeline(), made)
    made.train()
    trained, moved = weights(made), latents(made.pipeline, made)
    with made.initial.reference():
        assert torch.equal(latents(made.pipeline, made), expected)
    assert largest_difference(weights(made), trained) == 0
    assert torch.equal(latents(made.pipeline, made), moved) and not torch.equal(moved, expected)
    assert all(value.device.type == "cpu" for value in made.initial.values.values())
    kl = logged(made, "kl")
    assert kl[0] == 0 and kl[-1] > 0


def test_nft_has_an_old_policy_and_a_reference(tmp_path):
    """Three sets of all weights: trained, old and initial."""
    made = full(tmp_path, method="nft", beta=0.3, old_decay_rate=0.3, max_steps=3)
    before = weights(made)
    made.train()
    trained, old = weights(made), made.followers["old"].average
    with made.initial.reference():
        assert largest_difference(weights(made), before) == 0
    with made.sampling_policy():
        assert largest_difference(weights(made), old) == 0
    assert largest_difference(weights(made), trained) == 0
    assert 0 < largest_difference(old, before) and 0 < largest_difference(old, trained)
    distance = logged(made, "velocity/reference_distance")
    assert distance[0] == 0 and distance[-1] > 0


def test_no_unneeded_copy_of_the_weights_is_kept(tmp_path):
    made = full(tmp_path)
    assert made.initial.values is None
    with pytest.raises(RuntimeError, match="no copy of the initial weights was kept"):
        made.initial.untrained()


# --- checkpoints and files ---


@pytest.mark.parametrize(
    "method, settings",
    [
        ("grpo", {"beta": 0.01, "ema_decay": 0.9}),
        pytest.param("nft", {"beta": 0.3, "old_decay_rate": 0.3}, marks=pytest.mark.slow),
        pytest.param("awm", {"beta": 0.3, "average_decay_rate": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(method, settings, tmp_path):
    """AdamW, stopped at step 2 of 4: weights, averages and rewards, to the bit."""
    settings = {"method": method, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4} | settings
    whole = full(tmp_path / "whole", **settings)
    whole.train()
    full(tmp_path / "broken", callbacks=[tiny_runs.StopAt(2)], **settings).train()
    checkpoint = tmp_path / "broken" / "checkpoint-2"
    assert (checkpoint / "transformer" / "config.json").exists()
    again = full(tmp_path / "broken", **settings)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(weights(whole), weights(again)) == 0
    assert logged(whole, "reward") == logged(again, "reward")
    for name, average in whole._averages().items():
        if average is not None:
            assert largest_difference(average.average, again._averages()[name].average) == 0


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_saved_loads_in_plain_diffusers(family, tmp_path):
    """Loads the run's folder with the base model's; the average, if there is one."""
    quiet(BUILD[family]()).save_pretrained(tmp_path / "model")
    made = full(tmp_path / "run", family, model=str(tmp_path / "model"), ema_decay=0.5, max_steps=2)
    before = weights(made)
    made.train()
    trained = weights(made)
    made.save_model()
    files = json.loads((tmp_path / "run" / "run_files.json").read_text(encoding="utf-8"))["files"]
    assert {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "README.md"} <= set(files)
    config = (tmp_path / "run" / "transformer" / "config.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in config
    denoiser = CLASSES[family].from_pretrained(tmp_path / "run", subfolder="transformer")
    saved = {f"transformer.{name}": value.detach() for name, value in denoiser.named_parameters()}
    assert largest_difference(saved, made.ema.average) == 0 and largest_difference(saved, before) > 0
    fresh = quiet(type(made.pipeline).from_pretrained(tmp_path / "model", transformer=denoiser))
    with made.ema:
        assert torch.equal(latents(fresh, made), latents(made.pipeline, made))
    assert largest_difference(weights(made), trained) == 0


def test_a_damaged_file_is_noticed(tmp_path):
    """One weight of the file is another: the check reads what is on the disk."""
    made = full(tmp_path)
    made.save_model()
    with torch.no_grad():
        next(iter(made.adapter.values())).view(-1)[0] += 1e-3
    with pytest.raises(RuntimeError, match="are not those of transformer: 1 tensors"):
        made.trained.check_saved(
            made.pipeline, tmp_path, {"prompt": ["a"], "num_inference_steps": 2} | made.policy.pipeline_kwargs, 1e-4
        )
    assert made.pipeline.transformer is made.policy.denoiser["transformer"]
    with pytest.raises(RuntimeError, match="are not those of transformer: 1 tensors"):  # where ranks share weights
        made.trained.check_read_back(made.pipeline, tmp_path)


def test_the_best_model_is_loaded_and_compared(tmp_path):
    """Evaluations before and after, the best checkpoint loaded at the end, clips of the initial policy."""
    made = full(
        tmp_path,
        eval_dataset=prompts(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=2,
        learning_rate=0.1,
    )
    made.train()
    best = load_file(
        tmp_path / f"checkpoint-{made.state.best_global_step}" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert all(torch.equal(best[name.removeprefix("transformer.")], value) for name, value in weights(made).items())
    assert (tmp_path / "samples" / "before_after_eval.png").exists() and made.initial.values is not None


def test_a_run_uploads_components_and_card(tmp_path):
    full(tmp_path / "run", hub_model_id="me/mine").save_model()
    with running_hub() as server:
        push_adapter(tmp_path / "run", "me/mine")
    files = server.commits[-1]["files"]
    assert {"README.md", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"} <= set(files)
    card = files["README.md"].decode()
    assert 'WanTransformer3DModel.from_pretrained("me/mine", subfolder="transformer"' in card
    assert "\n- lora\n" not in card and "LoRA adapter" not in card


def test_gradients_travel_in_messages_of_limited_size(monkeypatch):
    """In order, each in one bucket; a larger one alone."""
    monkeypatch.setattr(gradients, "MESSAGE", 10)
    parts = [torch.zeros(size) for size in (4, 6, 1, 30, 2, 3)]
    assert [[len(g) for g in message] for message in gradients._messages(parts)] == [[4, 6], [1], [30], [2, 3]]


# --- what is refused ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_config": "half"}, "peft_config is 'half', but must be a peft.LoraConfig.*'full'"),
        ({"peft_config": "lora"}, "peft_config is 'lora', but must be"),
        ({"continue_from": "outputs/lora"}, "continue_from='outputs/lora' is a saved LoRA: merge it into the base"),
        ({"offload": ["denoiser"]}, "leave 'denoiser' out of offload"),
        ({"context_parallel": 2}, "context_parallel"),
        ({"lora_denoisers": ["unet"]}, r"lora_denoisers=\['unet'\]: name one or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{"peft_config": "full"} | settings)


@pytest.mark.parametrize(
    "environment, settings, message",
    [
        ({}, {"optim": "adafactor"}, r"optim='adafactor' may need whole weights.*set one of \['adamw_torch'"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward=false.*set it to true"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params=true.*set it to false"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused_before_a_model_is_loaded(
    environment, settings, message, tmp_path, monkeypatch
):
    """By the environment variables that `accelerate launch` sets."""
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"peft_config='full'.*{message}"):
        full(tmp_path, model="no/such model", **settings)


def test_zero3_is_refused(tmp_path):
    """ZeRO-2 is not: tests/distributed/test_deepspeed.py."""
    args = tiny_runs.config(tmp_path)
    args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
    with pytest.raises(ValueError, match="zero_stage=3 partitions frozen weights only: set zero_stage=2"):
        tiny_runs.VideoGRPOTrainer("no/such model", tiny_runs.brightness, args, prompts(), peft_config="full")


def test_quantised_weights_are_refused(tmp_path):
    pipe = tiny_runs.pipeline()
    pipe.transformer.proj_out.weight.data = pipe.transformer.proj_out.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="proj_out.weight of transformer.*cannot be trained"):
        full(tmp_path, model=pipe)


@pytest.mark.parametrize("first", ["full", None])
def test_a_checkpoint_of_the_other_kind_is_refused(first, tmp_path):
    trainer(tmp_path, peft_config=first, callbacks=[tiny_runs.StopAt(1)]).train()
    with pytest.raises(ValueError, match="trained (a LoRA|all weights of transformer), but this run trains"):
        trainer(tmp_path, peft_config=None if first else "full").train(resume_from_checkpoint=True)
