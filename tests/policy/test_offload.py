"""Offloading: the same numbers to the bit, weights present exactly while they are used, one copy on the device."""

import copy

import pytest
import torch
from policy.adapted import build
from policy.test_replay_parity import PROMPTS, seeded
from tiny_pipelines import BUILD, CALLS, CONDITIONS, EXPERTS, REFUSES, often

from pisces_rl.policy import (
    PolicyError,
    VideoPolicy,
    check_saved_lora,
    save_lora,
    without_adapters,
)
from pisces_rl.policy.pipeline import offload as offloading
from pisces_rl.policy.pipeline.offload import OFFLOADED, Part, device_of, kind_of, leave_idle, resident

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("absent_weights_are_nan")


def kinds(policy: VideoPolicy) -> list[str]:
    modules = [n for n, c in policy.pipeline.components.items() if isinstance(c, torch.nn.Module)]
    return [kind for kind in OFFLOADED if kind in {kind_of(name) for name in modules}]


def parts(policy: VideoPolicy) -> dict[str, Part]:
    return {name: c._hf_hook for name, c in policy.pipeline.components.items() if hasattr(c, "_hf_hook")}


def on_device(policy: VideoPolicy) -> set[str]:
    return {name for name, part in parts(policy).items() if part.is_resident}


def grpo(policy: VideoPolicy, parameters: dict, family: str) -> list[torch.Tensor]:
    """Videos, log-probs, replayed log-probs and gradients."""
    for parameter in parameters.values():
        parameter.grad = None
    rollout = policy.sample(PROMPTS, **seeded(family), step_seeds=[3, 4], steps=[0, 1])
    replayed = []

    def visit(step):
        replayed.append(step.log_prob.detach())
        step.log_prob.sum().backward()

    policy.replay(rollout, [0, 1], visit)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters.values()]
    return [rollout.videos, rollout.log_probs, *replayed, *gradients]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", often(BUILD))
def test_every_family_gives_the_same_numbers_with_all_of_it_offloaded(family):
    policy, parameters = build(family)
    expected = grpo(policy, parameters, family)
    policy.place(CPU, kinds(policy))
    assert on_device(policy) == set()
    assert_same(grpo(policy, parameters, family), expected)
    leave_idle(policy.pipeline)
    assert on_device(policy) == set()
    policy.place(CPU)
    assert not parts(policy)
    assert_same(grpo(policy, parameters, family), expected)


@pytest.mark.parametrize("family", often(f for f in BUILD if (f, "backpropagation") not in REFUSES))
def test_gradients_through_decoder_and_denoiser_are_the_same(family):
    policy, parameters = build(family)

    def follow(**how):
        for parameter in parameters.values():
            parameter.grad = None
        videos = policy.sample_with_gradients(PROMPTS, **seeded(family), last_steps=2, **how)
        held = on_device(policy)
        videos.square().mean().backward()
        return [videos.detach(), *(p.grad.clone() for p in parameters.values() if p.grad is not None)], held

    for how in ({}, {"checkpoint_decoder": False}):
        policy.place(CPU)
        expected, _ = follow(**how)
        policy.place(CPU, kinds(policy))
        found, held = follow(**how)
        assert_same(found, expected)
        assert "vae" in held and held & set(policy.denoiser), "backward needs both"
        leave_idle(policy.pipeline)
        assert on_device(policy) == set()


@pytest.mark.parametrize("family", ["wan", "wan22_a14b", "animatediff", "hunyuan"])
def test_only_the_module_in_use_is_on_the_device(family, monkeypatch):
    """Of parts without a graph one is there at a time, and the text encoder comes once for a batch of new prompts."""
    policy, _ = build(family)
    policy.place(CPU, kinds(policy))
    seen, came, enter = [], [], Part.enter

    def watched(part):
        before = part.is_resident
        enter(part)
        names = on_device(policy)
        seen.append(frozenset(names))
        if not before:
            came.extend(name for name, own in parts(policy).items() if own is part)

    monkeypatch.setattr(Part, "enter", watched)
    policy.sample(PROMPTS, **seeded(family), step_seeds=[3, 4], steps=[0, 1])
    texts = {name for name in parts(policy) if kind_of(name) == "text_encoder"}
    assert seen and all(len(names) == 1 or names <= texts for names in seen)
    assert all(came.count(name) == 1 for name in texts)
    came.clear()
    policy.sample(PROMPTS, **seeded(family))
    assert not set(came) & texts, "remembered prompts need no encoder"


def test_the_idle_expert_is_away():
    policy, _ = build("wan22_a14b", steps=5)
    policy.place(CPU, ["denoiser"])
    seen = []
    for name, module in policy.denoiser.items():
        module.blocks[0].register_forward_pre_hook(lambda *_, name=name: seen.append((name, on_device(policy))))
    rollout = policy.sample(PROMPTS, **seeded("wan22_a14b"), step_seeds=[3, 4], steps=[0, 1, 2, 3])
    sampled = len(seen)
    policy.replay(rollout, [0, 1], lambda step: step.log_prob.sum().backward())
    for calls in (seen[:sampled], seen[sampled:]):
        assert {name for name, _ in calls} == {"transformer", "transformer_2"}
        assert all(there == {name} for name, there in calls)


def test_an_expert_whose_graph_is_alive_stays():
    policy, parameters = build("wan22_a14b")
    policy.place(CPU, ["denoiser"])
    videos = policy.sample_with_gradients(PROMPTS, **seeded("wan22_a14b"), last_steps=3)
    assert on_device(policy) == set(EXPERTS["wan22_a14b"]) == {"transformer", "transformer_2"}
    videos.mean().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())
    leave_idle(policy.pipeline)
    assert on_device(policy) == set()


def test_a_dropped_graph_releases_its_weights():
    policy, _ = build("wan")
    policy.place(CPU, ["vae"])
    videos = policy.sample_with_gradients(PROMPTS, **seeded("wan"))
    leave_idle(policy.pipeline)
    assert on_device(policy) == {"vae"}
    del videos
    leave_idle(policy.pipeline)
    assert on_device(policy) == set()


def test_plain_calls_of_the_pipeline_work_outside_the_policy():
    policy, _ = build("wan")
    call = dict(CALLS["wan"], prompt="a fish", num_inference_steps=2, output_type="pt")

    def run():
        return policy.pipeline(**call, generator=torch.Generator().manual_seed(0)).frames

    expected = run()
    policy.place(CPU, kinds(policy))
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("family", ["wan", "wan22_a14b", "latte"])
def test_a_saved_adapter_is_checked_with_shared_weights(family, tmp_path):
    policy, _ = build(family)
    policy.place(CPU, kinds(policy))
    save_lora(policy.pipeline, tmp_path)
    call = {"prompt": ["a fish"], "num_inference_steps": 2} | CALLS[family]
    assert check_saved_lora(policy.pipeline, tmp_path, call, 1e-4) <= 1e-4
    fresh = without_adapters(policy.pipeline)
    name = next(iter(policy.denoiser))
    copied = getattr(fresh, name)
    assert copied is not policy.denoiser[name] and copied._hf_hook is policy.denoiser[name]._hf_hook
    shared = {id(p) for p in policy.denoiser[name].parameters()}
    assert all(id(p) in shared for p in copied.parameters())


def test_a_saved_adapter_of_other_weights_is_noticed(tmp_path):
    """The fresh pipeline runs its own modules: were its forward the trained one's, no difference would ever show."""
    policy, parameters = build("wan")
    policy.place(CPU, kinds(policy))
    save_lora(policy.pipeline, tmp_path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter += 0.5
    call = {"prompt": ["a fish"], "num_inference_steps": 2} | CALLS["wan"]
    with pytest.raises(RuntimeError, match="does not reproduce the trained model"):
        check_saved_lora(policy.pipeline, tmp_path, call, 1e-4)


def test_videos_are_encoded_while_the_autoencoder_is_away():
    policy, _ = build("wan")
    videos = torch.rand(1, *policy.latent_codec().video, generator=torch.Generator().manual_seed(0))
    expected = policy.latent_codec().encode(policy.pipeline, videos)
    policy.place(CPU, kinds(policy))
    assert torch.equal(policy.latent_codec().encode(policy.pipeline, videos), expected)
    assert on_device(policy) == set()


@pytest.mark.slow
def test_compiled_blocks_come_and_go():
    policy, parameters = build("wan")
    torch._dynamo.reset()
    policy.compile_blocks("everything", backend="aot_eager")
    expected = grpo(policy, parameters, "wan")
    policy.place(CPU, kinds(policy))
    assert_same(grpo(policy, parameters, "wan"), expected)


@pytest.mark.parametrize("family", BUILD)
def test_pipelines_find_their_device_though_all_weights_are_on_the_cpu(family):
    """Nothing but the hooks can say it, so `meta` is what they say here; a component that stays is there itself."""
    policy, _ = build(family)
    policy.place(CPU, kinds(policy))
    for part in parts(policy).values():
        part.execution_device = torch.device("meta")
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module) and not hasattr(component, "_hf_hook"):
            component.to("meta")
    assert policy.pipeline._execution_device.type == policy.device.type == "meta"
    assert all(device_of(policy.pipeline.components[name]).type == "meta" for name in parts(policy))


def test_trained_modules_stay_on_the_device():
    policy, parameters = build("wan")
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    policy.place(CPU, ["denoiser"])
    policy.sample(PROMPTS, **seeded("wan"))
    assert places == {name: parameter.data_ptr() for name, parameter in parameters.items()}


def test_several_are_resident_together_and_an_error_lets_go():
    policy, _ = build("hunyuan")
    policy.place(CPU, kinds(policy))
    components = policy.pipeline.components
    with pytest.raises(RuntimeError, match="stop"), resident([components["text_encoder"], components["vae"]]):
        assert on_device(policy) == {"text_encoder", "vae"}
        raise RuntimeError("stop")
    assert on_device(policy) == set()


def test_weights_are_packed_as_they_were(monkeypatch):
    """Buckets smaller than all of it and than one tensor, another memory format, two dtypes, tied weights."""
    monkeypatch.setattr(offloading, "BUCKET", 4096)
    module = torch.nn.Sequential(
        torch.nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d),
        torch.nn.Linear(16, 16).bfloat16(),
        torch.nn.Linear(40, 40),
        torch.nn.Embedding(3, 5),
        torch.nn.Linear(5, 3),
    ).requires_grad_(False)
    module[4].weight = module[3].weight
    before = copy.deepcopy(module.state_dict())
    strides = {name: value.stride() for name, value in module.state_dict().items()}
    packed = list(offloading._packed(list(module.parameters()), pin=False))
    assert len({value.untyped_storage().data_ptr() for value in packed}) > 1
    assert {name: value.stride() for name, value in module.state_dict().items()} == strides
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[4].weight is module[3].weight


@pytest.mark.parametrize("asked", ["vae", ["rewards"], ["text"], ["vae", "decoder"]])
def test_other_names_are_refused(asked):
    policy, _ = build("wan")
    with pytest.raises(PolicyError, match=r"offload=.*name some of them in a list"):
        policy.place(CPU, asked)


def test_quantised_weights_are_refused():
    class Int8(torch.nn.Parameter):
        pass

    policy, _ = build("wan")
    weight = policy.pipeline.text_encoder.shared.weight
    policy.pipeline.text_encoder.shared.weight = Int8(weight.data, requires_grad=False)
    with pytest.raises(PolicyError, match="is a Int8 of Tensor"):
        policy.place(CPU, ["text_encoder"])


def test_weights_that_are_not_frozen_are_refused():
    policy, _ = build("wan")
    policy.pipeline.vae.requires_grad_(True)
    with pytest.raises(PolicyError, match="vae has no frozen weights"):
        policy.place(CPU, ["vae"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_offloading_of_diffusers_is_not_for_training(checkpointing, tmp_path, monkeypatch):
    """Why `denoiser` offloads whole denoisers: what diffusers takes away after a block's forward is missing in its
    backward; with checkpointing it is brought back for it, and then stays, so that an update holds all of it."""

    def fresh(like, **kwargs):
        return torch.full_like(like, torch.nan, **kwargs)

    policy, parameters = build("wan")
    if checkpointing:
        policy.activation_checkpointing_enable()
    expected = grpo(policy, parameters, "wan")
    denoiser = policy.denoiser["transformer"]
    monkeypatch.setattr(torch, "empty_like", fresh)  # what is away on a disk
    denoiser.enable_group_offload(
        onload_device=CPU,
        offload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    found = grpo(policy, parameters, "wan")
    away = [bool(block.attn1.to_k.base_layer.weight.isnan().any()) for block in denoiser.blocks]
    assert torch.equal(found[1], expected[1])
    assert torch.stack([g.isnan().any() for g in found[4:]]).any() != checkpointing
    assert away == [not checkpointing] * len(denoiser.blocks)


def test_families_have_the_kinds_that_are_named():
    assert CONDITIONS.keys() == BUILD.keys()
    assert kind_of("image_encoder") == kind_of("text_encoder_2") == "text_encoder"
    assert kind_of("audio_vae") == "vae" and kind_of("transformer_2") == kind_of("unet") == "denoiser"
    assert kind_of("connectors") is kind_of("scheduler") is kind_of("image_processor") is None
