"""The fusion of attention and plans, and the rewards built on it."""

import itertools
import math

import pytest
import torch
from rewards.tiny_encoders import MATCHERS, build

from pisces_rl.ot.maps import LinearMap
from pisces_rl.rewards.encodings import shared_encodings
from pisces_rl.rewards.ot_attention import FUSIONS, PLANS, OTAttention
from pisces_rl.rewards.quality import OTQualityReward
from pisces_rl.rewards.semantic import OTSemanticReward

SCALING = 8**-0.5  # of the logits
PROMPTS = ["a red circle moving left", "two blue squares on black", ""]


@pytest.fixture(scope="module")
def videos():
    return torch.rand(3, 5, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer():
    """Words, positions, query, key and logits of one layer: 2 texts of 6 tokens, 1 + 2 x 3 x 3 video tokens."""
    generator = torch.Generator().manual_seed(0)
    words = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    axes = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), torch.arange(3.0), indexing="ij")
    positions = torch.cat([torch.full((1, 3), torch.nan), torch.stack(axes, -1).flatten(0, 2)])
    query, key = (torch.randn(2, 4, n, 8, generator=generator) for n in (6, 19))
    return words, positions, query, key, SCALING * query @ key.mT


def fused(settings, words, positions, query, key, logits):
    return settings.bind(words, positions)(0, query, key, logits, SCALING)


@pytest.mark.parametrize("plan, fusion", list(itertools.product(PLANS, FUSIONS)))
def test_special_tokens_keep_their_attention(layer, plan, fusion):
    words, *_, logits = layer
    after = fused(OTAttention(plan=plan, fusion=fusion), *layer)
    attention = logits.softmax(-1)
    rows = ~words[:, None, :, None].expand_as(after)
    torch.testing.assert_close(after[rows], attention[rows], rtol=1e-5, atol=1e-7)
    if fusion == "log":
        torch.testing.assert_close(after[..., 0], attention[..., 0], rtol=1e-4, atol=1e-6)  # the class token's column
        torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, 6))


def test_log_fusion_is_the_product_with_the_plan(layer):
    words, positions, query, key, logits = layer
    settings = OTAttention(fusion="log", class_tokens=True)
    bound = settings.bind(words, positions)
    attention, plan = logits.softmax(-1), bound.solve(bound.cost(query, key, logits, SCALING))
    product = attention * plan
    expected = product / product.sum(-1, keepdim=True)
    rows = words[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(fused(settings, *layer)[rows], expected[rows], rtol=1e-4, atol=1e-7)


def test_the_published_floor(layer):
    words, positions, query, key, logits = layer
    settings = OTAttention(plan="paper", fusion="log", floor=1e-3, class_tokens=True)
    bound = settings.bind(words, positions)
    attention, plan = logits.softmax(-1), bound.solve(bound.cost(query, key, logits, SCALING))
    product = (attention + 1e-3) * (plan / plan.sum(-1, keepdim=True) + 1e-3)
    expected = product / product.sum(-1, keepdim=True)
    rows = words[:, None, :, None].expand_as(expected)
    torch.testing.assert_close(fused(settings, *layer)[rows], expected[rows], rtol=1e-4, atol=1e-7)


def test_the_published_plan_is_the_unbalanced_one_in_the_log_fusion(layer):
    paper, unbalanced = (
        fused(OTAttention(plan=plan, fusion="log", tolerance=1e-6), *layer) for plan in ("paper", "unbalanced")
    )
    torch.testing.assert_close(paper, unbalanced, rtol=1e-3, atol=1e-6)


def test_the_mass_of_partial_plans(layer):
    words, positions, query, key, logits = layer
    bound = OTAttention(plan="partial", mass=0.6, tolerance=1e-6).bind(words, positions)
    plan = bound.solve(bound.cost(query, key, logits, SCALING))
    torch.testing.assert_close(plan.sum((-1, -2)), torch.full((2, 4), 0.6), rtol=1e-4, atol=0)
    share = plan.sum(-1) * words.sum(1)[:, None, None]
    assert share.max() < 1 + 1e-3 and share[words[:, None].expand_as(share)].std() > 0.01
    gated = fused(OTAttention(plan="partial", mass=0.6, fusion="gated", tolerance=1e-6), *layer).sum(-1)
    rows = words[:, None].expand_as(share)
    torch.testing.assert_close(gated[rows], share[rows], rtol=1e-3, atol=1e-5)
    halves = fused(OTAttention(plan="partial", mass=0.6, fusion="arithmetic", tolerance=1e-6), *layer).sum(-1)
    inside = logits.softmax(-1)[..., 1:].sum(-1)
    torch.testing.assert_close(halves[rows], ((1 + 1 - inside + inside * share) / 2)[rows], rtol=1e-3, atol=1e-5)


def costs_by_loops(settings, words, positions, query, key, logits):
    """The formula as it is written, cell by cell; 0 outside the plan."""
    placed = [j for j, where in enumerate(positions) if where.isfinite().all()]
    middle = [sum(float(positions[j, axis]) for j in placed) / len(placed) for axis in (1, 2)]
    spot = {j: [float(z) for z in positions[j]] if j in placed else [-1.0, *middle] for j in range(len(positions))}
    columns = list(spot) if settings.class_tokens else placed
    out = torch.zeros_like(logits)
    for b, h in itertools.product(range(len(logits)), range(logits.shape[1])):
        rows = words[b].nonzero()[:, 0].tolist()
        terms = {"cosine": {}, "time": {}, "space": {}}
        for i in rows:
            weight = {j: math.exp(logits[b, h, i, j]) for j in columns}
            tau, *pi = (sum(weight[j] * spot[j][axis] for j in columns) / sum(weight.values()) for axis in range(3))
            for j in columns:
                y, x = query[b, :, i].flatten(), key[b, :, j].flatten()
                terms["cosine"][i, j] = 1 - float(y @ x / (y.norm() * x.norm()))
                terms["time"][i, j] = abs(tau - spot[j][0])
                terms["space"][i, j] = math.dist(pi, spot[j][1:])
        scaled = unit_range if settings.normalise else dict
        cosine, time, space = (scaled(term) for term in terms.values())
        total = {at: cosine[at] + settings.temporal * time[at] + settings.spatial * space[at] for at in cosine}
        for (i, j), value in scaled(total).items():
            out[b, h, i, j] = value
    return out


def unit_range(term):
    low, high = min(term.values()), max(term.values())
    return {at: (value - low) / (high - low) if high > low else 0.0 for at, value in term.items()}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("class_tokens", [False, True])
@pytest.mark.parametrize("temporal, spatial", [(0, 0), (0.2, 0), (0, 0.2), (0.2, 0.3), (5, 5)])
def test_costs_are_the_formula(layer, temporal, spatial, class_tokens, normalise):
    settings = OTAttention(temporal=temporal, spatial=spatial, class_tokens=class_tokens, normalise=normalise)
    cost = settings.bind(*layer[:2]).cost(*layer[2:], SCALING).expand_as(layer[-1])
    torch.testing.assert_close(cost, costs_by_loops(settings, *layer), rtol=1e-4, atol=1e-5)


def test_costs_of_one_frame_or_one_place_have_no_such_term(layer):
    words, positions, query, key, logits = layer
    for axes, term in (([0], dict(temporal=5, spatial=0)), ([1, 2], dict(temporal=0, spatial=5))):
        flat = positions.clone()
        flat[1:, axes] = 0
        neither = dict(temporal=0, spatial=0)
        bound = (OTAttention(**kind).bind(words, flat) for kind in (neither, term))
        plain, weighted = (one.cost(query, key, logits, SCALING) for one in bound)
        torch.testing.assert_close(weighted, plain.expand_as(weighted))


def test_a_class_token_outside_the_plan_draws_no_word_to_it(layer):
    words, positions, query, key, logits = layer
    seen = logits.clone()
    seen[..., 0] += 10
    costs = [OTAttention().bind(words, positions).cost(query, key, x, SCALING) for x in (logits, seen)]
    torch.testing.assert_close(*costs)


def test_layers_and_heads(layer):
    logits = layer[-1]
    bound = OTAttention(layers=[1, 2]).bind(*layer[:2], layers=[0, 1])
    assert [bound.changes(i) for i in range(3)] == [False, True, False]
    one = fused(OTAttention(heads=[2], fusion="gated"), *layer)
    torch.testing.assert_close(one[:, [0, 1, 3]], logits.softmax(-1)[:, [0, 1, 3]])
    torch.testing.assert_close(one[:, 2], fused(OTAttention(fusion="gated"), *layer)[:, 2])


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize(
    "plan, fusion", [("partial", "log"), ("partial", "gated"), ("paper", "arithmetic"), (None, None)]
)
def test_semantic_reward_is_independent_of_batch_and_padding(name, plan, fusion, videos):
    encoder = build(name)
    attention = None if plan is None else OTAttention(plan=plan, fusion=fusion)
    reward = OTSemanticReward(encoder, attention, micro_batch=2)
    together = reward(PROMPTS, videos)
    assert together.shape == (3,) and together.min() >= 0 and together.max() <= 1
    for row, prompt in enumerate(PROMPTS):
        alone = reward([prompt], videos[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=2e-3, atol=1e-4)
    plain = OTSemanticReward(encoder)(PROMPTS, videos)
    torch.testing.assert_close(together[2], plain[2], rtol=1e-4, atol=1e-6)  # no words, no plan
    if plan is not None:
        assert (together[:2] - plain[:2]).abs().max() > 1e-4


@pytest.mark.parametrize("name", MATCHERS)
def test_plans_of_the_last_layer_cannot_reach_the_match(name, videos):
    encoder, attention = build(name), OTAttention(fusion="gated")
    text, video = encoder.encode_text(PROMPTS), encoder.encode_video(videos)
    *some, last = encoder.cross_layers
    assert list(encoder.fused_layers) == some

    def match(layers):
        return encoder.match(text, video, attention.bind(text.words, video.positions, layers))

    torch.testing.assert_close(match([last]), encoder.match(text, video), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(match(some), match(None), rtol=1e-4, atol=1e-5)
    assert (match(some) - match([]))[:2].abs().max() > 1e-4
    torch.testing.assert_close(OTSemanticReward(encoder, attention).logits(PROMPTS, videos), match(some))


@pytest.mark.parametrize("plan, fusion", list(itertools.product(PLANS, FUSIONS)))
def test_heads_share_a_plan_where_nothing_tells_them_apart(layer, plan, fusion):
    settings = OTAttention(plan=plan, fusion=fusion, temporal=0, spatial=0)
    bound = settings.bind(*layer[:2])
    solve, shapes = bound.solve, []
    bound.solve = lambda cost: shapes.append(cost.shape) or solve(cost)
    shared = bound(0, *layer[2:], SCALING)
    assert shapes == [(2, 1, 6, 19)]
    bound.solve = lambda cost: solve(cost.expand(-1, 4, -1, -1))
    torch.testing.assert_close(shared, bound(0, *layer[2:], SCALING), rtol=1e-4, atol=1e-5)


def test_drawings(videos):
    encoder = build("tiny_vtm")
    reward = OTSemanticReward(encoder, OTAttention(drawings=[]))
    pieces, positions, drawings = reward.draw(PROMPTS[:2], videos[:2])
    assert [d.layer for d in drawings] == list(encoder.fused_layers) and pieces[0][1:3] == ["a", "red"]
    assert drawings[0].plan.shape == drawings[0].attention.shape == (2, 2, 7, len(positions))
    assert reward.attention.drawings == []  # the user's list is no other's
    reward(PROMPTS, videos)
    assert len(reward.attention.drawings) == len(drawings)


def test_bad_settings():
    for settings, text in (
        (dict(plan="exact"), "plan='exact'"),
        (dict(fusion="sum"), "fusion='sum'"),
        (dict(mass=0), "mass=0"),
        (dict(mass=1.2), "mass=1.2"),
        (dict(plan="unbalanced", mass=1.0), "mass=1.0"),
        (dict(reg=0), "reg=0"),
        (dict(temporal=-1), "temporal=-1"),
        (dict(temporal=math.inf), "temporal=inf"),
        (dict(reg=math.inf), "reg=inf"),
        (dict(heads=[True]), r"heads=\[True\]"),
        (dict(floor=1e-6), "floor=1e-06: the arithmetic fusion has no floor"),
        (dict(heads=3), "heads=3"),
        (dict(heads=[]), r"heads=\[\]"),
        (dict(heads=[-1]), r"heads=\[-1\]"),
        (dict(layers=2), "layers=2"),
        (dict(normalise="yes"), "normalise='yes'"),
        (dict(layers=["1"]), r"layers=\['1'\]"),
    ):
        with pytest.raises(ValueError, match=text):
            OTAttention(**settings)
    with pytest.raises(ValueError, match="matcher: clip has no matching head"):
        OTSemanticReward(build("clip"))
    with pytest.raises(ValueError, match=r"layers \[0\] of tiny-vtm do not attend to the video; .* \[1, 2\]"):
        OTSemanticReward(build("tiny_vtm"), OTAttention(layers=[0, 1]))
    with pytest.raises(ValueError, match=r"plans in layers \[2\] cannot reach the match of tiny-vtm, .*: \[1\]"):
        OTSemanticReward(build("tiny_vtm"), OTAttention(layers=[2]))
    for name in MATCHERS:
        with pytest.raises(ValueError, match=r"attention: heads \[2, 99\] of .* it has 2 heads, 0 to 1"):
            OTSemanticReward(build(name), OTAttention(heads=[1, 2, 99]))


def test_semantic_rewards_name_bad_inputs(videos):
    for attention in (OTAttention(), None):
        reward = OTSemanticReward(build("tiny_vtm"), attention)
        with pytest.raises(TypeError, match="prompts: expected a list of strings"):
            reward("a red circle", videos[:1])
        with pytest.raises(TypeError, match="videos: expected a tensor .* ndarray"):
            reward(PROMPTS, videos.numpy())
        with pytest.raises(ValueError, match="2 prompts for 3 videos"):
            reward(PROMPTS[:2], videos)
    with pytest.raises(ValueError, match="2 prompts for 3 videos"):
        OTSemanticReward(build("tiny_vtm"), OTAttention()).draw(PROMPTS[:2], videos)


def test_rewards_work_in_inference_mode(videos):
    encoder = build("tiny_vtm")
    for reward in (OTQualityReward(encoder), OTSemanticReward(encoder, OTAttention())):
        expected = reward(PROMPTS, videos)
        with torch.inference_mode():
            torch.testing.assert_close(reward(PROMPTS, videos.clone()), expected)


def test_quality_is_the_cosine_with_the_mapped_text(videos):
    encoder = build("clip")
    text, video = encoder.encode_text(PROMPTS).pooled, encoder.encode_video(videos).pooled
    raw = OTQualityReward(encoder)(PROMPTS, videos)
    torch.testing.assert_close(raw, (text * video).sum(1), rtol=1e-4, atol=1e-6)
    ot_map = LinearMap(encoder=encoder.name).fit(torch.randn(50, 10), 2 * torch.randn(50, 10) + 1)
    mapped = torch.nn.functional.cosine_similarity(ot_map(text), video)
    torch.testing.assert_close(OTQualityReward(encoder, ot_map)(PROMPTS, videos), mapped, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="ot_map: it is bound to the encoder 'other', not to 'clip'"):
        OTQualityReward(encoder, LinearMap(encoder="other"))
    with pytest.raises(ValueError, match="bank: a divergence_weight needs"):
        OTQualityReward(encoder, divergence_weight=1.0)
    with pytest.raises(ValueError, match="at least one must differ from 0"):
        OTQualityReward(encoder, cosine_weight=0.0)


def test_each_video_is_encoded_once_for_each_encoder(videos, monkeypatch):
    encoder, calls = build("tiny_vtm"), []
    encode = type(encoder).encode_video
    monkeypatch.setattr(type(encoder), "encode_video", lambda self, x: calls.append(len(x)) or encode(self, x))
    rewards = [OTQualityReward(encoder), OTSemanticReward(encoder, OTAttention()), OTSemanticReward(encoder)]
    with shared_encodings():
        shared = [reward(PROMPTS, videos) for reward in rewards]
    assert calls == [3]
    for reward, value in zip(rewards, shared):
        torch.testing.assert_close(reward(PROMPTS, videos), value)
    assert len(calls) == 4
