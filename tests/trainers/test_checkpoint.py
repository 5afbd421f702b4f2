"""Trees of tensors and plain values on disk, without pickle."""

import collections
import random

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from pisces_rl.trainers.base.run.checkpoint import load_tree, random_state, restore_random_state, save_tree


def round_trip(tree, folder):
    save_tree(tree, folder / "tree")
    return load_tree(folder / "tree")


def test_plain_values_keep_their_types(tmp_path):
    tree = {
        "a": [1, 2.5, None, True, "x", (1, (2,)), []],
        3: {"b": -0.0, "c": 1e-300, "d": float("inf")},
        "empty": {},
        "tensor": "a name that looks like a key",
        "dict": 1,
        "list": 2,
        "tuple": (),
    }
    loaded = round_trip(tree, tmp_path)
    assert loaded == tree and repr(loaded) == repr(tree)
    assert {path.name for path in tmp_path.iterdir()} == {"tree.json", "tree.safetensors"}


def test_tensors_keep_dtype_shape_and_bits(tmp_path):
    base = torch.randn(4, 6)
    tree = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "bf16": base.bfloat16(),
        "bool": base > 0,
        "long": torch.tensor([2**62]),
        "view": base.T[1:],
        "shared": base[0],
        "nan": torch.tensor([float("nan")]),
    }
    loaded = round_trip(tree, tmp_path)
    for name, value in tree.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert torch.equal(loaded[name].nan_to_num(7), value.nan_to_num(7))


def test_arrays_come_back_as_arrays(tmp_path):
    tree = [np.arange(5, dtype=np.uint32), np.float32(0.5), np.int64(3), np.array(2.0)]
    loaded = round_trip(tree, tmp_path)
    assert isinstance(loaded[0], np.ndarray) and loaded[0].dtype == np.uint32 and loaded[0].tolist() == [0, 1, 2, 3, 4]
    assert loaded[1:3] == [0.5, 3] and float(loaded[3]) == 2.0


def test_subclasses_of_tuple_and_dict_load(tmp_path):
    point = collections.namedtuple("point", "x y")
    loaded = round_trip([torch.zeros(2, 3).shape, point(1, 2), collections.OrderedDict(a=1)], tmp_path)
    assert loaded == [(2, 3), (1, 2), {"a": 1}]


@pytest.mark.parametrize(
    "leaf",
    [object(), {1, 2}, b"bytes", torch.float32, 1j, lambda: 0],
    ids=["object", "set", "bytes", "dtype", "complex", "function"],
)
def test_other_leaves_are_refused(leaf, tmp_path):
    with pytest.raises(TypeError, match=f"a {type(leaf).__name__} cannot be saved without pickle"):
        save_tree({"a": [leaf]}, tmp_path / "tree")
    assert not list(tmp_path.iterdir())


def run(parameter, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter.sin() * parameter).sum().backward()
        optimizer.step()
        scheduler.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "constant_with_warmup"])
def test_adamw_and_its_schedule_continue_to_the_bit(kind, tmp_path):
    def made(value):
        parameter = torch.nn.Parameter(value.clone())
        optimizer = torch.optim.AdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.1, betas=(0.8, 0.9))
        return parameter, optimizer, get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=10)

    whole = made(torch.linspace(-1, 1, 7))
    run(*whole, 4)
    save_tree(whole[1].state_dict(), tmp_path / "optimizer")
    save_tree(whole[2].state_dict(), tmp_path / "scheduler")
    other = made(whole[0].detach())
    other[1].load_state_dict(load_tree(tmp_path / "optimizer"))
    other[2].load_state_dict(load_tree(tmp_path / "scheduler"))
    assert torch.equal(run(*whole, 4), run(*other, 4))
    assert whole[2].get_last_lr() == other[2].get_last_lr()
    assert (whole[1].param_groups[0]["betas"], whole[1].param_groups[0]["lr"]) == (
        other[1].param_groups[0]["betas"],
        other[1].param_groups[0]["lr"],
    )


def test_random_states_reproduce_their_draws(tmp_path):
    def draws():
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(3).tolist(),
            torch.rand(2).tolist(),
        ]

    random.gauss(0, 1), np.random.randn()  # leaves a second normal in both generators' pockets
    save_tree(random_state(), tmp_path / "random")
    expected = draws()
    restore_random_state(load_tree(tmp_path / "random"))
    assert draws() == expected
