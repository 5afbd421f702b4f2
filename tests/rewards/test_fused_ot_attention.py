"""The CUDA kernels against plain torch: on a GPU, or by Triton's interpreter where only triton is installed."""

from triton_scripts import check

SCRIPT = """
    import sys
    import torch
    from pisces_rl.rewards import fused_ot_attention as fused
    from pisces_rl.rewards.ot_attention import OTAttention
    device = sys.argv[1]
    on_device = fused.serves if device == "cuda" else lambda logits: logits.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)

    def both(call):
        results = []
        for serves in (lambda logits: False, on_device):
            fused.serves = serves
            results.append(call())
        return results

    def close(ours, plain):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)

    for n, (frames, rows, columns) in ((7, (5, 3, 3)), (1, (1, 1, 1)), (19, (4, 9, 8))):
        words = torch.rand(3, n, generator=generator) < 0.7
        words[0] = True
        words[1] = False  # an empty prompt
        axes = torch.meshgrid(*(torch.arange(float(k)) for k in (frames, rows, columns)), indexing="ij")
        positions = torch.cat([torch.full((1, 3), torch.nan), torch.stack(axes, -1).flatten(0, 2)])
        query, key = (torch.randn(3, 4, k, 8, generator=generator) for k in (n, len(positions)))
        words, positions, query, key = (x.to(device) for x in (words, positions, query, key))
        scaling = 3 / 8**0.5
        logits = scaling * query @ key.mT
        for settings in (
            dict(fusion="log"), dict(fusion="arithmetic"), dict(temporal=0), dict(spatial=0),
            dict(temporal=0, spatial=0), dict(normalise=False), dict(class_tokens=True, fusion="log"),
            dict(fusion="gated", plan="partial", mass=0.5), dict(temporal=0, spatial=0, fusion="gated"),
            dict(plan="partial", mass=0.5, class_tokens=True, fusion="arithmetic"),
        ):
            bound = OTAttention(**settings).bind(words, positions)
            close(*both(lambda: bound.cost(query, key, logits, scaling)))
            plan = bound.solve(bound.cost(query, key, logits, scaling))
            bound.solve = lambda cost: plan
            close(*both(lambda: bound(0, query, key, logits, scaling)))
            half = both(lambda: bound(0, query, key, logits, scaling, None, torch.bfloat16))
            assert half[0].dtype == half[1].dtype == torch.bfloat16
    if device == "cuda":  # from the second call on by a graph, if few cells: other values of the same shape, too
        from pisces_rl.rewards import graphs, ot_attention
        for settings in (dict(), dict(fusion="log", plan="balanced"), dict(temporal=0, spatial=0, fusion="gated")):
            for seed in range(4):
                torch.manual_seed(seed)
                own = torch.rand(3, 19, device=device) < 0.7
                inputs = torch.randn_like(query), torch.randn_like(key)
                product = scaling * inputs[0] @ inputs[1].mT
                bound = OTAttention(**settings).bind(own, positions)
                with torch.inference_mode(seed % 2 == 1):
                    ours = bound(0, *inputs, product, scaling)
                    ot_attention.LAUNCH_BOUND = 0
                    plain = bound(0, *inputs, product, scaling)
                    ot_attention.LAUNCH_BOUND = 2**20
                torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
        assert sum(graph is not None for graph in graphs._graphs.values()) >= 3
    logits[2, 3, 2] = float("nan")
    words[2, 2] = True
    bound = OTAttention().bind(words, positions)
    for weights in both(lambda: bound(0, query, key, logits, scaling)):  # the plan is solved, the NaN goes on
        assert weights[0].isfinite().all() and weights[2, 3, 2].isnan().all()
    print("agree")
"""


def test_the_kernels_agree_with_plain_torch(tmp_path):
    check(SCRIPT, tmp_path)
