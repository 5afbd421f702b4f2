"""Record the calls that a pipeline makes to its networks, which have no weights.

The pipeline and its (small) latents are real, so token counts, guidance, masks and the expert of each step are exact.
A network's call runs on fake tensors once per set of shapes; the pipeline receives zeros.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..policy.sessions.backprop import DifferentiableSampling
from ..policy.sessions.pipeline_call import run_until_left
from ..policy.sessions.session import LeavePipeline, replaced_method
from .live_bytes import AsOnCUDA
from .networks import Call, Networks, bytes_of


class Recording(DifferentiableSampling):
    """Deterministic sampling of some videos, up to the first decode.

    Attributes:
        steps: the denoiser calls of each distinct kind of denoising step.
        vae: the first call of vae.decode; None if the pipeline has no VAE.
        latent_bytes: bytes of one video's latents in fp32.
        prompt_bytes: bytes cached per prompt.
    """

    def __init__(self, networks: Networks, videos: int):
        super().__init__(networks.policy, ["a prompt"] * videos, start=0)
        self.networks, self.vae = networks, None
        self._this_step: dict[str, Call] = {}  # by number, network and shapes
        self._kinds: dict[str, list[Call]] = {}
        self._outputs: dict[str, object] = {}  # by network and shapes
        with contextlib.ExitStack() as replaced:
            for name, module in networks.modules.items():
                forward = functools.partial(self._forward, name)
                replaced.enter_context(replaced_method(module, "forward", forward))
            if "vae" in networks.modules:
                replaced.enter_context(replaced_method(networks.modules["vae"], "decode", self._decode))
            run_until_left(self, range(videos), "pt")
        self.steps = list(self._kinds.values())
        self.latent_bytes = self.final.numel() * 4 // videos
        memory = self.policy.prompt_memo.memory
        self.prompt_bytes = bytes_of(tensors(list(memory.values()))) // max(1, len(memory))

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self._kinds.setdefault(" ".join(self._this_step), list(self._this_step.values()))
        self._this_step = {}
        return super().step(prediction, x)

    def _forward(self, name: str, own, *args, **kwargs):
        args, kwargs = self.networks.fake((args, kwargs))
        key = f"{name} {shapes_of((args, kwargs))}"
        if name in self.networks.denoisers:
            self._this_step[f"{len(self._this_step)} {key}"] = name, args, kwargs
        if key not in self._outputs:
            with self.networks.mode, AsOnCUDA(), torch.no_grad():
                self._outputs[key] = own(*args, **kwargs)
        return tree_map(
            lambda t: torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t, self._outputs[key]
        )

    def _decode(self, own, *args, **kwargs):
        self.vae = "vae", *self.networks.fake((args, kwargs))
        raise LeavePipeline


def shapes_of(value) -> str:
    """Return the shapes and dtypes of the tensors in a structure, and its other leaves."""
    return repr([(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in tree_leaves(value)])


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
