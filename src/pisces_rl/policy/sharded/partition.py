"""Shard denoisers' frozen weights with DeepSpeed's ZeRO-3 (arXiv 1910.02054): each block is gathered when it runs.

The pipeline calls its denoisers itself, so nothing is wrapped: hooks of the submodules gather and free weights.
Adapters are gathered once and stay whole on every rank. Gathering is a collective: all ranks must call the denoisers
equally often.
"""

from torch.distributed import init_device_mesh

from ..fast.execution import repeated_blocks
from ..video_policy import VideoPolicy

# DeepSpeed requires a batch size, which is not used. Weights are gathered when needed and not prefetched: the order of
# modules differs between sampling and update. memory_efficient_linear would replace torch.nn.functional.linear in the
# whole process.
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": None,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
    },
}


def partition(policy: VideoPolicy, device_type: str, ranks: int) -> None:
    """Shard the denoisers' frozen weights over all ranks; call this after adding adapters.

    From then on all ranks must make the same calls to this policy at the same time, with equal numbers of videos.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    denoisers = policy.denoiser
    for denoiser in denoisers.values():
        for block in repeated_blocks(denoiser):
            set_z3_leaf_module(block, True)
        for buffer in denoiser.buffers():
            buffer.data = buffer.data.to(device_type)
    adapter = [p for p in denoisers.parameters() if p.requires_grad]
    deepspeed.zero.Init(module=denoisers, config_dict_or_path=CONFIG)
    engine = deepspeed.initialize(model=denoisers, config=CONFIG)[0]
    adapter[0].all_gather(param_list=adapter)
    _free_after_each_call(engine.optimizer)
    for parameter in adapter:
        parameter.ds_active_sub_modules.add("adapter")  # weights that a module uses are not freed

    def start(module, inputs):
        engine.optimizer.release_backward_leftovers()  # of modules whose inputs have no gradient; keeps engine alive

    for denoiser in denoisers.values():
        denoiser.register_forward_pre_hook(start, prepend=True)
    policy.mesh = init_device_mesh(device_type, (ranks,))


def _free_after_each_call(offload) -> None:
    """Free a module's weights in backward after each of its calls.

    DeepSpeed frees them when the gradients of the module's inputs are computed, and counts those of the last call.
    Guidance calls a denoiser twice before backward, so the count is reset for the earlier call. Otherwise all weights
    would still be gathered at the end of backward.
    """
    end_forward, end_backward = offload.post_sub_module_forward_function, offload.post_sub_module_backward_function

    def forward(module):
        end_forward(module)
        module.inputs_with_gradient = module.ds_grads_remaining

    def backward(module):
        end_backward(module)
        module.ds_grads_remaining = module.inputs_with_gradient

    offload.post_sub_module_forward_function, offload.post_sub_module_backward_function = forward, backward
