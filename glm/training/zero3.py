"""Full tuning by ZeRO stage 3 (Rajbhandari et al. 2020), DeepSpeed's: weights, gradients and moments shared out.

DeepSpeed holds them as flat pieces. Saved are whole tensors, in the form that one process's AdamW has, so that a
checkpoint is good for any strategy and any number of processes.
"""

import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from glm.models.methods import trained_parameters
from glm.training.distributed import BUCKET, rank, world_size
from glm.training.layers import decoder_layers
from glm.training.rank_trainer import RankTrainer
from glm.training.sharding import whole_state

if not torch.cuda.is_available():  # else DeepSpeed, which accelerate imports where it is installed, warns of that
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero3Trainer(RankTrainer):
    """A `RankTrainer` whose weights DeepSpeed shares out when the training begins."""

    has_shares = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        adamw = super().create_optimizer(model)
        self.optimizer = EngineOptimizer(adamw, self.model, self.args.max_grad_norm)
        return self.optimizer

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return super()._forward_backward(self.optimizer.engine, inputs)

    def _backward(self, loss: Tensor) -> None:
        self.optimizer.engine.backward(loss)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """The norm before clipping. DeepSpeed clips within its step, which therefore is taken here."""
        self.optimizer.engine.step()
        return self.optimizer.engine.get_global_grad_norm()

    def _trained_state(self) -> dict[str, Any]:
        return {"trained": whole_state(trained_parameters(self.model)), "optimizer": self.optimizer.state_dict()}

    def release(self) -> None:
        """Free what the training held, once the weights are back: DeepSpeed's caches never let go of an engine."""
        zero = self.optimizer.engine.optimizer
        self.optimizer.engine.destroy()
        moments = [moment for state in self.optimizer.state.values() for moment in state.values()]
        for tensor in (*self.optimizer.pieces, *moments, zero.lp_param_buffer, zero.grad_partitions_flat_buffer):
            tensor.untyped_storage().resize_(0)


class EngineOptimizer(AcceleratedOptimizer):
    """Hands `adamw` and its parameters, those of `model`, over to an engine, and stands for it towards the Trainer.

    Its learning rates are `adamw`'s, and its state is that of an AdamW of whole parameters.
    """

    def __init__(self, adamw: torch.optim.Optimizer, model: nn.Module, max_grad_norm: float) -> None:
        super().__init__(adamw, device_placement=False)
        self._is_accelerate_prepared = True
        self.parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
        self.indices = [group["params"] for group in adamw.state_dict()["param_groups"]]
        self.engine = start_engine(model, adamw, max_grad_norm)

    def step(self, closure: Any = None) -> None:
        """Nothing: the engine has taken it."""

    @property
    def pieces(self) -> list[Tensor]:
        """This process's shares of the parameters, side by side: what `adamw` works on."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def state_dict(self) -> dict[str, Any]:
        """On the CPU of the first process, for it alone to use. All processes have to ask for it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self.optimizer.state[self.pieces[0]]["step"].cpu()
        state = {}
        for index, parameter in enumerate(self.parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if rank() == 0:
                state[index] = {"step": step.clone()} | {name: moment.cpu() for name, moment in moments.items()}
        groups = [group | {"params": indices} for group, indices in zip(self.param_groups, self.indices, strict=True)]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group |= saved | {"params": group["params"]}
        step = next(iter(state["state"].values()))["step"]
        for piece in self.pieces:
            self.optimizer.state[piece] = {"step": step.to(piece.device, copy=True)}
            self.optimizer.state[piece] |= {name: torch.zeros_like(piece) for name in MOMENTS}
        for index, moments in state["state"].items():
            parameter = self.parameters[index]
            for name in MOMENTS:
                safe_set_local_optimizer_state(parameter, share_of(moments[name], parameter), name)


def start_engine(model: nn.Module, adamw: torch.optim.Optimizer, max_grad_norm: float) -> Any:
    """DeepSpeed's engine of `model`, whose weights it shares out, and of `adamw`, which is to change them.

    A decoder layer is gathered as a whole: inside of it nothing is hooked, so that it can be compiled and checkpointed.
    """
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls it by older names
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled first; gloo does it as well
    deepspeed.utils.set_z3_leaf_modules(model, list({type(layer) for layer in decoder_layers(model)}))
    config = {
        "train_micro_batch_size_per_gpu": 1,  # for its statistics only
        "managed_gradient_accumulation": False,  # a step is as many backward passes as there were
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # small weights come with their layer
            "reduce_bucket_size": BUCKET,
            # its own linear adds the bias in place, twice where checkpointing has kept the product
            "memory_efficient_linear": False,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    return engine


def share_of(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's share of a `value` of the shape of `parameter`, as DeepSpeed cuts it."""
    size = parameter.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, size * world_size() - value.numel()))
    return padded[size * rank() : size * (rank() + 1)]
