"""Low-rank compression of trained networks, and metrics of how low the rank of their weights is.

`truncated_svd`, `asvd` and `svd_llm` work on one kernel; `compress_kernels` on a tree of parameters, with path rules
and what `collect_inputs` has gathered over calibration batches.

BibTeX:

@inproceedings{wang2025svdllm,
  title = {{SVD-LLM}: Truncation-aware Singular Value Decomposition for Large Language Model Compression},
  author = {Wang, Xin and Zheng, Yu and Wan, Zhongwei and Zhang, Mi},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
}

@article{yuan2023asvd,
  title = {{ASVD}: Activation-aware Singular Value Decomposition for Compressing Large Language Models},
  author = {Yuan, Zhihang and Shang, Yuzhang and Song, Yue and Wu, Qiang and Yan, Yan and Sun, Guangyu},
  journal = {arXiv preprint arXiv:2312.05821},
  year = {2023},
}

@article{eckart1936approximation,
  title = {The approximation of one matrix by another of lower rank},
  author = {Eckart, Carl and Young, Gale},
  journal = {Psychometrika},
  volume = {1},
  number = {3},
  year = {1936},
}

@inproceedings{roy2007effective,
  title = {The effective rank: A measure of effective dimensionality},
  author = {Roy, Olivier and Vetterli, Martin},
  booktitle = {European Signal Processing Conference},
  year = {2007},
}

@article{dolatabadi2026numuon,
  title = {{NuMuon}: Nuclear-Norm-Constrained {Muon} for Compressible {LLM} Training},
  author = {Dolatabadi, H. M. and Ajanthan, T. and Ramasinghe, S. and Hewa Koneputugodage, C. and Siriwardhana, S. and
    Shevchenko, V. and Pajak, K. and Snewin, J. and Avraham, G. and Long, A.},
  journal = {arXiv preprint arXiv:2603.03597},
  year = {2026},
}
"""

from jaxlib_methods.low_rank._compress import (
    InputStatistics as InputStatistics,
    collect_inputs as collect_inputs,
    compress_kernels as compress_kernels,
    factorize_kernels as factorize_kernels,
    linear_inputs as linear_inputs,
    sensitivity_search as sensitivity_search,
)
from jaxlib_methods.low_rank._decompositions import (
    LowRank as LowRank,
    asvd as asvd,
    rank_for_keep as rank_for_keep,
    svd_llm as svd_llm,
    truncated_svd as truncated_svd,
    whitening_factor as whitening_factor,
)
from jaxlib_methods.low_rank._metrics import effective_rank as effective_rank, stable_rank as stable_rank

__all__ = [
    "InputStatistics",
    "LowRank",
    "asvd",
    "collect_inputs",
    "compress_kernels",
    "effective_rank",
    "factorize_kernels",
    "linear_inputs",
    "rank_for_keep",
    "sensitivity_search",
    "stable_rank",
    "svd_llm",
    "truncated_svd",
    "whitening_factor",
]
