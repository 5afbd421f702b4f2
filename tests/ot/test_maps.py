"""Maps: closed forms, files, determinism, resuming, streams, and two processes against one."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from pisces_rl.ot import maps
from pisces_rl.ot.maps import (
    EntropicMap,
    IdentityMap,
    LinearMap,
    MapWarning,
    MeanShiftMap,
    NeuralMap,
    RegressedMap,
    ShuffledMap,
    TransportMap,
    fit_best,
)
from pisces_rl.ot.maps.closed_form import bures_matrix, shrunk_covariance
from pisces_rl.ot.maps.fit_best import advise
from pisces_rl.ot.metrics import l2_uvp

TINY = dict(hidden=16, steps=12, inner_steps=2, batch_size=32, evaluate_every=4, device="cpu")


@pytest.fixture
def clouds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    return x, torch.tanh(x) * 1.5 + x @ torch.diag(torch.linspace(0.2, 1.5, 6)) + 2


def every_map():
    return [
        IdentityMap(),
        MeanShiftMap(),
        LinearMap(),
        EntropicMap(),
        EntropicMap(linear=False),
        NeuralMap(**TINY),
        NeuralMap(skip="linear", **TINY),
    ]


def test_linear_is_the_map_between_gaussians():
    generator = torch.Generator().manual_seed(0)
    root_s, root_t = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    source, target = root_s @ root_s.T, root_t @ root_t.T
    matrix = bures_matrix(source, target)
    torch.testing.assert_close(matrix @ source @ matrix, target, atol=1e-8, rtol=0)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    x = torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    fitted = LinearMap().fit(x @ root_s.T, y @ root_t.T)
    assert l2_uvp(fitted(x @ root_s.T), x @ root_s.T @ matrix).value < 0.5


def test_linear_without_variance_in_a_direction_is_finite():
    x = torch.randn(50, 4)
    x[:, 2] = 1
    assert LinearMap(shrinkage=0.0).fit(x, torch.randn(50, 4))(x).isfinite().all()


def test_ledoit_wolf_shrinks_less_with_more_points():
    """More points, less shrinkage; the identity's share is 1 for isotropic data's limit of few points."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.1, 3, 10, dtype=torch.float64)
    shares = [
        shrunk_covariance(torch.randn(n, 10, generator=generator, dtype=torch.float64) * scales)[1]
        for n in (20, 200, 5000)
    ]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    assert shrunk_covariance(torch.randn(15, 10, generator=generator, dtype=torch.float64))[1] > 0.5


def test_mean_shift(clouds):
    x, y = clouds
    torch.testing.assert_close(MeanShiftMap().fit(x, y)(x).mean(0), y.mean(0), atol=1e-5, rtol=0)


def test_entropic_map_of_large_reg_is_the_linear_map(clouds):
    x, y = clouds
    linear = LinearMap().fit(x, y)(x)
    assert (EntropicMap(reg=1e4).fit(x, y)(x) - linear).abs().max() < 1e-2
    assert (EntropicMap(reg=0.05).fit(x, y)(x) - linear).abs().max() > 0.1


def test_maps_are_deterministic_and_files_give_them_back(clouds, tmp_path):
    x, y = clouds
    for i, (first, second) in enumerate(zip(every_map(), every_map())):
        first.encoder, first.normalise = "encoder-a", "l2"
        second.normalise = "l2"
        first.fit(x, y), second.fit(x, y)
        mapped = first(x)
        assert torch.equal(mapped, second(x)) and mapped.shape == x.shape and not mapped.requires_grad
        first.save(tmp_path / str(i))
        loaded = TransportMap.load(tmp_path / str(i), encoder="encoder-a")
        assert type(loaded) is type(first) and loaded.normalise == "l2"
        torch.testing.assert_close(loaded(x), mapped, atol=1e-6, rtol=1e-6)
        point = x[:3].clone().requires_grad_()
        loaded(point).sum().backward()
        assert point.grad.isfinite().all()
        torch.testing.assert_close(loaded(x[None, :4]), mapped[None, :4], atol=1e-4, rtol=1e-4)


def test_files_that_do_not_fit_are_refused(clouds, tmp_path):
    x, y = clouds
    with pytest.raises(RuntimeError, match="not fitted"):
        LinearMap()(x)
    with pytest.raises(RuntimeError, match="nothing to save"):
        LinearMap().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no map"):
        TransportMap.load(tmp_path / "nowhere")
    LinearMap(encoder="a").fit(x, y).save(tmp_path)
    with pytest.raises(ValueError, match="encoder: the map is for 'a', not for 'b'"):
        TransportMap.load(tmp_path, encoder="b")
    card = json.loads((tmp_path / "map.json").read_text())
    (tmp_path / "map.json").write_text(json.dumps(card | {"kind": "cubic"}))
    with pytest.raises(ValueError, match="kind 'cubic'"):
        TransportMap.load(tmp_path)
    for broken in ({k: v for k, v in card.items() if k != "settings"}, [card], card | {"settings": {"size": 3}}):
        (tmp_path / "map.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="truncated or damaged"):
            TransportMap.load(tmp_path)
    other = tmp_path / "other"
    MeanShiftMap().fit(x, y).save(other)
    (tmp_path / "map.json").write_text((other / "map.json").read_text())
    with pytest.raises(ValueError, match="truncated or damaged.*shift"):
        TransportMap.load(tmp_path)
    (tmp_path / "map.json").write_text(json.dumps(card))
    weights = tmp_path / "map.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or damaged"):
        TransportMap.load(tmp_path)


def test_bad_input_names_the_argument(clouds):
    x, y = clouds
    for wrong, message in ((x[0], "source: expected"), (x * float("nan"), "source: expected"), (x[:1], "source")):
        with pytest.raises(ValueError, match=message):
            LinearMap().fit(wrong, y)
    with pytest.raises(ValueError, match="target: expected points of 6 dimensions"):
        LinearMap().fit(x, y[:, :5])
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., 6\)"):
        LinearMap().fit(x, y)(x[:, :5])
    with pytest.raises(ValueError, match="normalise='l1'"):
        LinearMap(normalise="l1")
    with pytest.raises(ValueError, match="shrinkage=2"):
        LinearMap(shrinkage=2)
    with pytest.raises(ValueError, match="reg=0"):
        EntropicMap(reg=0)
    with pytest.raises(ValueError, match="skip='bilinear'"):
        NeuralMap(skip="bilinear")
    for wrong, message in (
        (dict(steps=0), "steps=0"),
        (dict(ema_decay=1.5), "ema_decay=1.5"),
        (dict(seed=-1), "seed=-1"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(max_grad_norm=0.0), "max_grad_norm"),
        (dict(weight_decay=float("nan")), "weight_decay"),
    ):
        with pytest.raises(ValueError, match=message):
            NeuralMap(**wrong)
    with pytest.raises(ValueError, match="target: all points"):
        EntropicMap(linear=False).fit(torch.ones(9, 3), torch.ones(9, 3))


def test_neural_resumes_to_the_same_map(clouds, tmp_path, monkeypatch):
    x, y = clouds
    whole = NeuralMap(**TINY).fit(x, y, progress=False)
    advance = maps.neural_training.Training.advance

    def interrupted(training):
        if training.step == 7:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(maps.neural_training.Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        NeuralMap(**TINY).fit(x, y, folder=tmp_path, progress=False)
    monkeypatch.undo()
    resumed = NeuralMap(**TINY).fit(x, y, folder=tmp_path, progress=False)
    assert torch.equal(resumed(x), whole(x)) and resumed.report == whole.report
    with pytest.raises(ValueError, match="other hidden"):
        NeuralMap(**(TINY | {"hidden": 8})).fit(x, y, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="other data"):
        NeuralMap(**TINY).fit(x + 1, y, folder=tmp_path, progress=False)
    card = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({k: v for k, v in card.items() if k != "stale"}))
    with pytest.raises(ValueError, match="folder: .* damaged"):
        NeuralMap(**TINY).fit(x, y, folder=tmp_path, progress=False)
    state = next(tmp_path.glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="folder: .* damaged"):
        NeuralMap(**TINY).fit(x, y, folder=tmp_path, progress=False)


def test_a_training_is_not_resumed_on_points_that_changed_anywhere(clouds, tmp_path):
    x, y = clouds
    held_out = x[:20], y[:20]
    NeuralMap(**TINY).fit(x, y, held_out=held_out, folder=tmp_path, progress=False)
    changed = x.clone()
    changed[-1] += 5
    with pytest.raises(ValueError, match="other data"):
        NeuralMap(**TINY).fit(changed, y, held_out=held_out, folder=tmp_path, progress=False)


def test_neural_held_out_of_another_width(clouds):
    x, y = clouds
    with pytest.raises(ValueError, match="held_out source: expected points of"):
        NeuralMap(**TINY).fit(x, y, held_out=(x[:20, :2], y[:20, :2]), progress=False)


def test_a_neural_map_that_is_no_longer_finite_ends_with_the_best(clouds, monkeypatch):
    x, y = clouds
    advance = maps.neural_training.Training.advance

    def breaking(training):
        advance(training)
        if training.step == 6:
            training.average[0].weight.data.fill_(float("nan"))

    monkeypatch.setattr(maps.neural_training.Training, "advance", breaking)
    with pytest.warns(UserWarning, match="no longer finite after 8 steps"):
        fitted = NeuralMap(**TINY).fit(x, y, progress=False)
    assert fitted(x).isfinite().all() and fitted.report["steps_done"] == 8


def test_neural_with_a_linear_skip_is_never_worse_than_linear_where_it_stops_early(clouds):
    x, y = clouds
    fitted = NeuralMap(skip="linear", **TINY).fit(x, y, progress=False)
    assert fitted.report["best_divergence"] <= fitted.report["curve"][0][1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("skip", ["none", "linear"])
def test_neural_replayed_from_a_graph_is_neural_step_by_step(clouds, monkeypatch, skip):
    x, y = clouds
    settings = TINY | dict(steps=40, skip=skip, device="cuda")
    replayed = NeuralMap(**settings).fit(x, y, progress=False)
    monkeypatch.setattr(maps.neural_training, "WARM_UP", 10**6)
    by_step = NeuralMap(**settings).fit(x, y, progress=False)
    torch.testing.assert_close(replayed(x), by_step(x), rtol=1e-4, atol=1e-4)


def test_neural_stops_early(clouds):
    x, y = clouds
    fitted = NeuralMap(**(TINY | dict(skip="linear", steps=400, learning_rate=0.5, patience=2))).fit(
        x, y, progress=False
    )
    assert fitted.report["steps_done"] < 400


class Chunks:
    """An iterable of points that can be iterated again."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x.split(37))


def test_neural_from_a_stream(clouds, tmp_path, monkeypatch):
    x, y = clouds
    held_out = x[:50], y[:50]
    settings = TINY | dict(skip="linear")
    fitted = NeuralMap(**settings).fit(Chunks(x), Chunks(y), held_out=held_out, progress=False)
    steps = NeuralMap(**settings)._fit_by_steps(Chunks(x), Chunks(y), held_out, tmp_path)
    for _ in range(7):  # and no further: as if it had been killed
        next(steps)
    resumed = NeuralMap(**settings).fit(Chunks(x), Chunks(y), held_out=held_out, folder=tmp_path, progress=False)
    assert torch.equal(resumed(x), fitted(x)) and resumed.report == fitted.report
    assert fitted(x).isfinite().all() and len(fitted.report["curve"]) == 4
    with pytest.raises(ValueError, match="none besides the held-out ones"):
        NeuralMap(**TINY).fit(Chunks(x), Chunks(y), progress=False)
    monkeypatch.setattr(maps.neural, "HELD_OUT", 64)
    without = NeuralMap(**settings).fit(Chunks(x), Chunks(y), progress=False)  # held out: the first points
    assert without(x).isfinite().all()
    for wrong, message in (
        (iter([x]), "source: an iterator ends"),
        ([], "source: the iterable has no"),
        ([x * float("nan")], "source: expected batches of finite"),
        ([(x,)], "source: expected batches.*TensorDataset"),
        ([x[:, :2]], r"source: expected batches of finite points \(b, "),
    ):
        with pytest.raises(ValueError, match=message):
            NeuralMap(**TINY).fit(wrong, Chunks(y), held_out=held_out, progress=False)


@pytest.mark.slow
def test_neural_on_two_processes_keeps_ranks_equal(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist
        from pisces_rl.ot.maps import NeuralMap
        dist.init_process_group("gloo")
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        fitted = NeuralMap(hidden=8, steps=4, inner_steps=2, batch_size=16, evaluate_every=2, device="cpu").fit(
            x, x * 2 + 1, progress=False)
        mapped = fitted(x)
        both = [torch.empty_like(mapped) for _ in range(2)]
        dist.all_gather(both, mapped)
        assert torch.equal(*both)
        if dist.get_rank() == 0:
            print("equal", fitted.report["steps_done"])
        dist.destroy_process_group()
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "equal 4" in done.stdout, done.stderr


def test_fit_best_returns_the_winner_with_its_table(clouds):
    x, y = clouds
    best = fit_best(x, y, paired=True, encoder="e")
    names = [row["map"] for row in best.table]
    kinds = {"identity", "mean_shift", "regressed", "linear", "entropic"}
    assert set(names) == kinds and best.map.kind == names[0]
    values = [row["divergence"].value for row in best.table]
    assert values == sorted(values) and names[-1] == "identity"
    assert [m.kind for m in best.maps] == names and best.map.encoder == "e" and "held_out" in best.map.report
    assert str(best).count("\n") == 6 and "recall@10" in str(best)


@pytest.mark.parametrize(
    ("raw", "linear", "says", "advised"),
    [
        (5, 1, "Transport pays here: use the linear map", "linear"),
        (1, 5, "Transport does not pay here: use the raw cosine", "identity"),
        (2, 2, "Transport does not pay here: use the raw cosine", "identity"),
    ],
)
def test_the_advice_follows_held_out_retrieval(raw, linear, says, advised):
    ranks = [(kind(), torch.full((100,), rank)) for kind, rank in ((IdentityMap, raw), (LinearMap, linear))]
    sentence, map_ = advise([*ranks, (ShuffledMap(), torch.ones(100))])
    gain = 1 / linear - 1 / raw
    assert sentence.startswith(says) and map_.kind == advised
    assert f"on 50 held-out pairs, linear minus identity: {gain:+.4f}" in sentence


def test_pairs_of_the_second_half_judge_the_winner_of_the_first():
    lucky = torch.tensor([1, 9] * 50)  # best on the pairs that choose, worst on those that compare
    sentence, map_ = advise([(IdentityMap(), torch.full((100,), 2)), (LinearMap(), lucky)])
    assert map_.kind == "identity" and "-0.3889" in sentence


def test_a_rotation_is_beyond_unpaired_transport():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    paired, unpaired = (fit_best(x, x @ rotation, paired=flag) for flag in (True, False))
    assert "use the regressed map, without transport" in paired.advice and paired.advised.kind == "regressed"
    assert "Without pairs" in unpaired.advice and unpaired.advised is unpaired.map


def test_a_map_that_loses_to_linear_says_so(clouds):
    x, y = clouds
    with pytest.warns(MapWarning, match="neural map does not beat the linear one"):
        best = fit_best(x, y, maps=[NeuralMap(**TINY)])
    assert best.map.kind == "linear"


def test_fit_best_bad_input(clouds):
    x, y = clouds
    with pytest.raises(ValueError, match="paired: expected equally many"):
        fit_best(x, y[:-1], paired=True)
    with pytest.raises(ValueError, match=r"held_out=1\.5"):
        fit_best(x, y, held_out=1.5)
    with pytest.raises(ValueError, match="fewer than two points"):
        fit_best(x[:4], y[:4])
    for other in (dict(normalise="l2"), dict(encoder="e")):  # their divergences would be in other units
        with pytest.raises(ValueError, match="maps: the mean_shift map has"):
            fit_best(x, y, maps=[MeanShiftMap(**other)])


def test_a_baseline_of_other_settings_is_scored_beside_the_plain_one(clouds):
    x, y = clouds
    best = fit_best(x, y, maps=[LinearMap(shrinkage=1.0)])
    assert sorted(row["map"] for row in best.table) == ["identity", "linear", "linear", "mean_shift"]
    plain = fit_best(x, y, maps=[LinearMap()])
    assert sorted(row["map"] for row in plain.table) == ["identity", "linear", "mean_shift"]


def test_a_shuffled_map_is_the_linear_one_elsewhere(clouds, tmp_path):
    x, y = clouds
    linear, shuffled = LinearMap().fit(x, y)(x), ShuffledMap().fit(x, y)
    image = shuffled(x)
    torch.testing.assert_close(image.sort(1).values, linear.sort(1).values)
    assert (image - linear).abs().max() > 0.1
    shuffled.save(tmp_path)
    assert torch.equal(TransportMap.load(tmp_path)(x), ShuffledMap().fit(x, y)(x))


def test_regression_is_least_squares(clouds):
    x, y = clouds
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    expected = design @ torch.linalg.lstsq(design, y.double()).solution
    torch.testing.assert_close(RegressedMap(ridge=0.0).fit(x, y)(x.double()), expected, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="target: a regression needs pairs"):
        RegressedMap().fit(x, y[:-1])
