"""The CUDA kernel against the general solver: on a GPU, or by Triton's interpreter where only triton is installed."""

from triton_scripts import check

SCRIPT = """
    import sys, warnings
    import torch
    from pisces_rl.ot import fused, partial_transport_plan, plans, transport_plan
    device = sys.argv[1]
    if device == "cpu":  # the interpreter's
        fused.serves = lambda cost, tolerance: cost.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for n, m in ((5, 37), (37, 5), (16, 130), (1, 1)):
        cost = torch.rand(4, n, m, generator=generator).to(device)
        a, b = (torch.rand(4, size, generator=generator).to(device) + 0.05 for size in (n, m))
        a[1, (n + 1) // 2 :] = 0  # padding
        a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
        a[3] = 0  # an empty prompt
        cost[3] = float("nan")
        strided = cost.transpose(1, 2).contiguous().transpose(1, 2)
        for solve, options in (
            (transport_plan, dict(reg=0.05)),
            (transport_plan, dict(reg=0.05, reach=0.2)),
            (partial_transport_plan, dict(reg=0.05, mass=torch.tensor([0.6, 0.9, 0.3, 0.5]))),
            (transport_plan, dict(reg=0.003)),  # left to the general solver, by its error
        ):
            exact = [x.double().cpu() for x in (cost, a, b)]  # many small iterations: launches would take minutes
            double = solve(*exact, **options, tolerance=1e-10, max_iterations=100_000)
            for given in (strided, cost):
                single = solve(given.requires_grad_(given.is_leaf), a, b, **options)
                assert single.converged.all() and single.plan.isfinite().all()
                assert (single.plan.cpu() - double.plan).abs().sum((1, 2)).max() < 2e-3, (n, m, options)
                torch.testing.assert_close(single.value.double().cpu(), double.value, atol=2e-5, rtol=0)
                assert single.plan[3].abs().max() == 0 and single.value[3] == 0
            if options["reg"] == 0.003:
                continue
            alone = solve(cost[2], a[2], b[2], **{k: v[2] if k == "mass" else v for k, v in options.items()})
            difference = float((alone.plan - single.plan[2]).abs().max())
            assert difference < 1e-6, (n, m, options, difference)
    good = torch.rand(2, 4, 6, generator=generator).to(device)
    for change, message in (
        (dict(a=-torch.ones(4, device=device)), "a: weights"),
        (dict(cost=good.masked_fill(good < 0.2, float("nan"))), "cost: NaN"),
        (dict(cost=good.masked_fill(good < 0.2, float("inf"))), "cost: NaN"),
        (dict(a=torch.ones(4, device=device)), "equal masses"),
    ):
        try:
            transport_plan(**(dict(cost=good, reg=0.1) | change))
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")
    print("agree")
"""


def test_the_kernel_agrees_with_the_general_solver(tmp_path):
    check(SCRIPT, tmp_path)
