"""accelerate as engine: processes, precision, trackers; and weights sharded over processes (FSDP2).

accelerate 1.15 offers FSDP2 to GPUs only; torch's own `fully_shard` runs on CPU processes as well, so that what the
tests see is what a cluster runs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from git_model.architecture import DTYPES
from git_model.config import Config
from git_model.errors import UserError
from git_model.hardware import check_card, check_precision
from git_model.models.git import GitModel
from git_model.weights import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_accelerator(config: Config) -> Accelerator:
    """Return the engine: one path for CPU, one card, several cards.

    Raises:
        UserError: a card this build of torch is not for; a precision it has no arithmetic for; --fsdp on one process.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    options = config.train
    check_card()
    check_precision(options.precision, config.language.dtype)
    # unused branches (an attention pool beside grid features) have no gradient
    # the others wait while the main process validates: longer than NCCL's ten minutes
    handlers: list[Any] = [
        DistributedDataParallelKwargs(find_unused_parameters=True),
        InitProcessGroupKwargs(timeout=timedelta(hours=3)),
    ]
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
        cpu=not torch.cuda.is_available(),
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=options.output_dir,
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UserError(
            f"started with accelerate's {accelerator.distributed_type.value}: the loop accumulates, clips and saves by "
            "itself; start it with torchrun, and --fsdp for weights that do not fit one card"
        )
    if options.fsdp and accelerator.num_processes < 2:
        raise UserError("--fsdp shards the weights over processes: torchrun --nproc_per_node=2 (or more) train.py ...")
    return accelerator


def shard(model: GitModel, config: Config, device: torch.device, world: int) -> None:
    """Spread every weight over the processes, in place (FSDP2); a block's are together only while it computes.

    Args:
        model: whole, on the CPU: a block at a time goes to the device.
        config: its precision is that of the products; sums of gradients are float32.
        device: of this process.
        world: number of processes.

    Raises:
        UserError: batch norms in half precision, whose statistics stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    half = None if config.train.precision == "fp32" else getattr(torch, DTYPES[config.train.precision])
    if half and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.vision.modules()):
        told = "choose a ViT, or --precision fp32"
        raise UserError(f"--fsdp cannot shard the batch norms of '{config.vision.name}' in half precision; {told}")
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    mesh = init_device_mesh(device.type, (world,))
    for block in (*blocks(model.language.model), *blocks(model.vision)):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")
    model.language.sharded = True


def blocks(part: nn.Module) -> list[nn.Module]:
    """Return the layers of the heaviest stack of equal layers in a part; none where there is no stack."""
    stacks = [list(m) for m in part.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    stacks = [stack for stack in stacks if len({type(layer) for layer in stack}) == 1]
    weights = [sum(p.numel() for layer in stack for p in layer.parameters()) for stack in stacks]
    return stacks[weights.index(max(weights))] if weights else []


def from_main(value: Any) -> Any:
    """Return the main process's value on all."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state as it is without sharding: any number of processes may go on from it."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Bring an optimiser to a state of `optimizer_state`; a sharded parameter takes its share."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def share(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    moments = {
        number: {name: share(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    # before loading: torch puts the counts of steps where a fused kernel, or none, expects them
    own = [group.get("fused") for group in optimizer.param_groups]
    groups = [{**group, "fused": fused} for group, fused in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})
