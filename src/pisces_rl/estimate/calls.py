"""What a pipeline hands to its networks: their calls, recorded while the pipeline runs around networks of no weights.

The pipeline is the real one, with real (small) latents, so that token counts, guidance, masks and the experts of each
step are its own. A network's call is run on fake tensors once for each set of shapes; the pipeline gets zeros.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..policy.pipeline.guider import guided
from .networks import Networks, bytes_of


class _Decoding(BaseException):
    """Raised when the pipeline asks for its first decode: the rest is not needed."""


@dataclass
class Calls:
    """The calls of one run of a pipeline for `batch` videos.

    Attributes:
        steps: for each different kind of denoising step the calls it makes: (denoiser, args, kwargs) on fake tensors.
        decode: (args, kwargs) of the first call of vae.decode; None where the pipeline has no vae.
        latent_bytes: of the latents that one step hands to the next, in fp32.
        prompt_bytes: of one prompt's embeddings.
    """

    batch: int
    steps: list[list[tuple[str, tuple, dict]]] = field(default_factory=list)
    decode: tuple[tuple, dict] | None = None
    latent_bytes: int = 0
    prompt_bytes: int = 0


def shapes_of(value) -> str:
    """Shapes and dtypes of the tensors in a structure, and its other leaves."""
    return repr([(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in tree_leaves(value)])


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def record(networks: Networks, batch: int, call: dict) -> Calls:
    """Run the pipeline for `batch` videos with the arguments `call`."""
    calls, this_step = Calls(batch), []
    kinds: dict[str, list] = {}
    outputs: dict[tuple[str, str], object] = {}  # component, shapes -> output

    def network(name, *args, **kwargs):
        args, kwargs = networks.fake((args, kwargs))
        if name in networks.denoisers:
            this_step.append((name, args, kwargs))
        key = name, shapes_of((args, kwargs))
        if key not in outputs:
            with torch.no_grad():
                outputs[key] = networks.run(name, args, kwargs)
        return tree_map(lambda t: torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t,
                        outputs[key])

    def step(own, model_output, timestep, sample, *args, **kwargs):
        if this_step:
            kinds.setdefault(repr([(c[0], [t.shape for t in tensors(c)]) for c in this_step]), list(this_step))
        this_step.clear()
        calls.latent_bytes = sample.numel() * 4
        return own(model_output, timestep, sample, *args, **kwargs)

    def decode(*args, **kwargs):
        calls.decode = networks.fake((args, kwargs))
        raise _Decoding

    def encode(own, *args, **kwargs):
        output = own(*args, **kwargs)
        calls.prompt_bytes = bytes_of(tensors(output)) // batch
        return output

    pipeline, scheduler = networks.pipeline, copy.deepcopy(networks.pipeline.scheduler)
    own_scheduler, signature = pipeline.scheduler, inspect.signature(type(scheduler).step)
    scheduler.step = functools.partial(step, scheduler.step)
    scheduler.step.__signature__ = inspect.Signature(list(signature.parameters.values())[1:])
    pipeline.scheduler = scheduler
    pipeline.encode_prompt = functools.partial(encode, type(pipeline).encode_prompt.__get__(pipeline))
    for name, module in networks.modules.items():
        module.forward = functools.partial(network, name)
    if "vae" in networks.modules:
        networks.modules["vae"].decode = decode
    arguments = {"prompt": ["a prompt"] * batch, "output_type": "pt",
                 "generator": [torch.Generator().manual_seed(row) for row in range(batch)], **call}
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * batch
    try:
        with torch.no_grad(), guided(pipeline, arguments) as arguments:
            inspect.unwrap(type(pipeline).__call__)(pipeline, **arguments)
    except _Decoding:
        pass
    finally:
        pipeline.scheduler = own_scheduler
        del pipeline.encode_prompt
        for module in networks.modules.values():
            del module.forward
        if "vae" in networks.modules:
            del networks.modules["vae"].decode
    calls.steps = list(kinds.values())
    return calls
