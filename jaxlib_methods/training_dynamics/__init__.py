r"""How training depends on the batch size and on the smoothness of the loss: what is measured, and what theory says.

    law = fit_steps_to_result(batch_sizes, steps)          # K = c1 / B + c2
    law.critical_batch_size                                # where more data parallelism stops paying
    local_lipschitz(gradient_fn, params, next_params)      # of the gradient, along one step of training

BibTeX:

@inproceedings{lee2021understanding,
  title = {Understanding the effects of data parallelism and sparsity on neural network training},
  author = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S. and Jaggi, Martin},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  eprint = {2003.11316},
  archivePrefix = {arXiv},
}

@article{bottou2018optimization,
  title = {Optimization methods for large-scale machine learning},
  author = {Bottou, L{\'e}on and Curtis, Frank E. and Nocedal, Jorge},
  journal = {SIAM Review},
  volume = {60},
  number = {2},
  pages = {223--311},
  year = {2018},
}

@inproceedings{santurkar2018how,
  title = {How does batch normalization help optimization?},
  author = {Santurkar, Shibani and Tsipras, Dimitris and Ilyas, Andrew and Madry, Aleksander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2018},
}
"""

from jaxlib_methods.training_dynamics._local_lipschitz import (
    GAMMAS as GAMMAS,
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
    "GAMMAS",
    "BatchSizeLaw",
    "fit_steps_to_result",
    "local_lipschitz",
    "mean_gradient",
    "sgd_batch_size_law",
    "sgd_steps_to_result",
]
