"""Memory and time of a training step, before it runs and from the model's config alone.

Memory is counted in bytes a tensor at a time: what autograd keeps of a decoder layer, in the dtypes in which PEFT, TRL
and transformers keep it. Counted against torch's own record of live storages it is right to a percent, and against
steps on GPUs to what `benchmarks/planning.py` prints. Time is arithmetic over achievable rates: matrix products and
attention in FLOPs, everything between them in bytes.

Letters: T tokens in a forward, h hidden size, W what the MLP's inputs are projected to (gate and up together), Q and K
the widths of all queries and of all keys and values, L layers, V vocabulary.
"""

from .check import ModelCheck, check_model
from .gpus import GPUS, Gpu, find_gpu, gpu_called, local_gpu
from .memory import GIB
from .plan import LengthPlan, RunPlan, plan_run
from .settings import RunSettings

__all__ = [
    "GIB",
    "GPUS",
    "Gpu",
    "LengthPlan",
    "ModelCheck",
    "RunPlan",
    "RunSettings",
    "check_model",
    "find_gpu",
    "gpu_called",
    "local_gpu",
    "plan_run",
]
