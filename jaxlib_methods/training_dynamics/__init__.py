r"""How training depends on the batch size and on the smoothness of the loss: what is measured, and what theory says.

    law = fit_steps_to_result(batch_sizes, steps)          # K = c1 / B + c2
    law.critical_batch_size                                # where more data parallelism stops paying
    local_lipschitz(gradient_fn, params, next_params)      # of the gradient, along one step of training

| question | measured | in theory |
| --- | --- | --- |
| how many steps does a batch size need | `fit_steps_to_result` | `sgd_steps_to_result`, `sgd_batch_size_law` |
| how smooth is the loss along training | `local_lipschitz` of `mean_gradient`, at `STEP_FRACTIONS` of a step | |
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.training_dynamics._local_lipschitz import (
    STEP_FRACTIONS as STEP_FRACTIONS,
    local_lipschitz as local_lipschitz,
    mean_gradient as mean_gradient,
)
from jaxlib_methods.training_dynamics._steps_to_result import (
    BatchSizeLaw as BatchSizeLaw,
    fit_steps_to_result as fit_steps_to_result,
    sgd_batch_size_law as sgd_batch_size_law,
    sgd_steps_to_result as sgd_steps_to_result,
)

__all__ = [
    "STEP_FRACTIONS",
    "BatchSizeLaw",
    "fit_steps_to_result",
    "local_lipschitz",
    "mean_gradient",
    "sgd_batch_size_law",
    "sgd_steps_to_result",
]

moved_names(__name__, {"GAMMAS": "training_dynamics.STEP_FRACTIONS"})
