"""What each Lightning strategy needs around a freeze and an evaluation, so that no callback asks which one runs."""

from kappa_lightning.evaluation import Share
from kappa_lightning.strategies.adapter import StrategyAdapter
from kappa_lightning.strategies.ddp import DDPAdapter
from kappa_lightning.strategies.model_parallel import ModelParallelAdapter
from kappa_lightning.strategies.optimizers import add_beside, optimized
from kappa_lightning.strategies.rates import scale_rates
from kappa_lightning.strategies.registry import adapter_for, register_adapter

__all__ = [
    "DDPAdapter",
    "ModelParallelAdapter",
    "Share",
    "StrategyAdapter",
    "adapter_for",
    "add_beside",
    "optimized",
    "register_adapter",
    "scale_rates",
]
