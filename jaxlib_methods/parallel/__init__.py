"""Pipelines over a mesh of devices, and a model of how long they take over slow links.

BibTeX:

@inproceedings{huang2019gpipe,
  title = {{GPipe}: Efficient Training of Giant Neural Networks using Pipeline Parallelism},
  author = {Huang, Yanping and Cheng, Youlong and Bapna, Ankur and Firat, Orhan and Chen, Mia Xu and Chen, Dehao and
    Lee, HyoukJoong and Ngiam, Jiquan and Le, Quoc V. and Wu, Yonghui and Chen, Zhifeng},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019},
}

@inproceedings{narayanan2021efficient,
  title = {Efficient Large-Scale Language Model Training on {GPU} Clusters Using {Megatron-LM}},
  author = {Narayanan, Deepak and Shoeybi, Mohammad and Casper, Jared and LeGresley, Patrick and Patwary, Mostofa and
    Korthikanti, Vijay and Vainbrand, Dmitri and Kashinkunti, Prethvi and Bernauer, Julie and Catanzaro, Bryan and
    Phanishayee, Amar and Zaharia, Matei},
  booktitle = {International Conference for High Performance Computing, Networking, Storage and Analysis},
  year = {2021},
}

@inproceedings{narayanan2019pipedream,
  title = {{PipeDream}: Generalized Pipeline Parallelism for {DNN} Training},
  author = {Narayanan, Deepak and Harlap, Aaron and Phanishayee, Amar and Seshadri, Vivek and Devanur, Nikhil R. and
    Ganger, Gregory R. and Gibbons, Phillip B. and Zaharia, Matei},
  booktitle = {Symposium on Operating Systems Principles},
  year = {2019},
}

@inproceedings{ajanthan2025nesterov,
  title = {Nesterov Method for Asynchronous Pipeline Parallel Optimization},
  author = {Ajanthan, Thalaiyasingam and Ramasinghe, Sameera and Zuo, Yan and Avraham, Gil and Long, Alexander},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  eprint = {2505.01099},
  archivePrefix = {arXiv},
}

@article{dolatabadi2026sentinel,
  title = {{SENTINEL}: Stagewise Integrity Verification for Pipeline Parallel Decentralized Training},
  author = {Dolatabadi, Hadi Mohaghegh and Ajanthan, Thalaiyasingam and Ramasinghe, Sameera and
    Hewa Koneputugodage, Chamin and Avraham, Gil and Zuo, Yan and Shevchenko, Violetta and Long, Alexander},
  journal = {arXiv preprint arXiv:2603.03592},
  year = {2026},
}

@inproceedings{long2025unextractable,
  title = {Unextractable Protocol Models: Collaborative Training and Inference without Weight Materialization},
  author = {Long, Alexander and Hewa Koneputugodage, Chamin and Ajanthan, Thalaiyasingam and Zuo, Yan and
    Avraham, Gil and Shevchenko, Violetta and Mohaghegh Dolatabadi, Hadi and Ramasinghe, Sameera},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2605.23464},
  archivePrefix = {arXiv},
}

@inproceedings{ramasinghe2025protocol,
  title = {Subspace Networks: Scaling Decentralized Training with Communication-Efficient Model Parallelism},
  author = {Ramasinghe, Sameera and Ajanthan, Thalaiyasingam and Avraham, Gil and Zuo, Yan and Long, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
}
"""

from jaxlib_methods.parallel._asynchronous import AsynchronousState as AsynchronousState
from jaxlib_methods.parallel._asynchronous import asynchronous_pipeline as asynchronous_pipeline
from jaxlib_methods.parallel._attacks import ATTACKS as ATTACKS
from jaxlib_methods.parallel._attacks import Attack as Attack
from jaxlib_methods.parallel._attacks import AttackState as AttackState
from jaxlib_methods.parallel._attacks import adaptive as adaptive
from jaxlib_methods.parallel._attacks import check_attacks as check_attacks
from jaxlib_methods.parallel._attacks import collude as collude
from jaxlib_methods.parallel._attacks import init_attacks as init_attacks
from jaxlib_methods.parallel._attacks import invisible_noise as invisible_noise
from jaxlib_methods.parallel._attacks import random_sign as random_sign
from jaxlib_methods.parallel._attacks import random_values as random_values
from jaxlib_methods.parallel._attacks import tamper as tamper
from jaxlib_methods.parallel._boundary_transforms import Sides as Sides
from jaxlib_methods.parallel._boundary_transforms import cast_like as cast_like
from jaxlib_methods.parallel._boundary_transforms import master_copy as master_copy
from jaxlib_methods.parallel._boundary_transforms import morph as morph
from jaxlib_methods.parallel._boundary_transforms import morph_snapshot as morph_snapshot
from jaxlib_methods.parallel._boundary_transforms import transform_momentum as transform_momentum
from jaxlib_methods.parallel._codecs import Codec as Codec
from jaxlib_methods.parallel._codecs import Payload as Payload
from jaxlib_methods.parallel._codecs import cast_codec as cast_codec
from jaxlib_methods.parallel._codecs import codec_hook as codec_hook
from jaxlib_methods.parallel._codecs import coded_boundary as coded_boundary
from jaxlib_methods.parallel._codecs import identity_codec as identity_codec
from jaxlib_methods.parallel._codecs import payload_bytes as payload_bytes
from jaxlib_methods.parallel._collectives import Collective as Collective
from jaxlib_methods.parallel._collectives import collectives as collectives
from jaxlib_methods.parallel._collectives import link_bytes as link_bytes
from jaxlib_methods.parallel._engine import Traffic as Traffic
from jaxlib_methods.parallel._extraction import estimate_bridge as estimate_bridge
from jaxlib_methods.parallel._extraction import extraction_probability as extraction_probability
from jaxlib_methods.parallel._grassmann import MomentState as MomentState
from jaxlib_methods.parallel._grassmann import change_basis as change_basis
from jaxlib_methods.parallel._grassmann import gradient_moment as gradient_moment
from jaxlib_methods.parallel._grassmann import grassmann_step as grassmann_step
from jaxlib_methods.parallel._hooks import BoundaryHook as BoundaryHook
from jaxlib_methods.parallel._hooks import DataHook as DataHook
from jaxlib_methods.parallel._hooks import HookInfo as HookInfo
from jaxlib_methods.parallel._hooks import chain_hooks as chain_hooks
from jaxlib_methods.parallel._layout import Snapshot as Snapshot
from jaxlib_methods.parallel._links import LINKS as LINKS
from jaxlib_methods.parallel._links import Link as Link
from jaxlib_methods.parallel._links import StageCosts as StageCosts
from jaxlib_methods.parallel._links import StepTime as StepTime
from jaxlib_methods.parallel._links import all_reduce_time as all_reduce_time
from jaxlib_methods.parallel._links import blocking_floor as blocking_floor
from jaxlib_methods.parallel._links import largest_pipeline as largest_pipeline
from jaxlib_methods.parallel._links import predict_step as predict_step
from jaxlib_methods.parallel._links import stage_costs as stage_costs
from jaxlib_methods.parallel._local_sgd import DiLoCoState as DiLoCoState
from jaxlib_methods.parallel._local_sgd import FedAvgState as FedAvgState
from jaxlib_methods.parallel._local_sgd import StreamingDiLoCoState as StreamingDiLoCoState
from jaxlib_methods.parallel._local_sgd import diloco as diloco
from jaxlib_methods.parallel._local_sgd import fed_avg as fed_avg
from jaxlib_methods.parallel._local_sgd import outer_sgd as outer_sgd
from jaxlib_methods.parallel._local_sgd import streaming_diloco as streaming_diloco
from jaxlib_methods.parallel._lossy_codecs import DeltaState as DeltaState
from jaxlib_methods.parallel._lossy_codecs import delta_codec as delta_codec
from jaxlib_methods.parallel._lossy_codecs import int8_codec as int8_codec
from jaxlib_methods.parallel._lossy_codecs import top_k_codec as top_k_codec
from jaxlib_methods.parallel._mesh import make_mesh as make_mesh
from jaxlib_methods.parallel._mesh import shard_batch as shard_batch
from jaxlib_methods.parallel._mesh import split_microbatches as split_microbatches
from jaxlib_methods.parallel._message_distances import DISTANCES as DISTANCES
from jaxlib_methods.parallel._message_distances import expand_reference as expand_reference
from jaxlib_methods.parallel._message_distances import message_distances as message_distances
from jaxlib_methods.parallel._message_distances import message_summary as message_summary
from jaxlib_methods.parallel._message_distances import random_directions as random_directions
from jaxlib_methods.parallel._message_distances import sliced_wasserstein as sliced_wasserstein
from jaxlib_methods.parallel._message_distances import tukey_fence as tukey_fence
from jaxlib_methods.parallel._packing import Packed as Packed
from jaxlib_methods.parallel._pipeline import Losses as Losses
from jaxlib_methods.parallel._pipeline import Pipeline as Pipeline
from jaxlib_methods.parallel._random_transforms import Transform as Transform
from jaxlib_methods.parallel._random_transforms import draw_transform as draw_transform
from jaxlib_methods.parallel._random_transforms import draw_transforms as draw_transforms
from jaxlib_methods.parallel._robust_aggregation import centered_clip as centered_clip
from jaxlib_methods.parallel._robust_aggregation import coordinate_median as coordinate_median
from jaxlib_methods.parallel._robust_aggregation import geometric_median as geometric_median
from jaxlib_methods.parallel._robust_aggregation import krum_scores as krum_scores
from jaxlib_methods.parallel._robust_aggregation import multi_krum as multi_krum
from jaxlib_methods.parallel._robust_aggregation import trimmed_mean as trimmed_mean
from jaxlib_methods.parallel._schedules import bubble_fraction as bubble_fraction
from jaxlib_methods.parallel._schedules import schedule_table as schedule_table
from jaxlib_methods.parallel._sentinel import Verdicts as Verdicts
from jaxlib_methods.parallel._sentinel import VerifiedPipeline as VerifiedPipeline
from jaxlib_methods.parallel._sentinel import VerifiedState as VerifiedState
from jaxlib_methods.parallel._sentinel import guard_model as guard_model
from jaxlib_methods.parallel._sentinel import verification_hook as verification_hook
from jaxlib_methods.parallel._sparse_averaging import SparseAveragingState as SparseAveragingState
from jaxlib_methods.parallel._sparse_averaging import averaged_per_round as averaged_per_round
from jaxlib_methods.parallel._sparse_averaging import ema_weight_schedule as ema_weight_schedule
from jaxlib_methods.parallel._sparse_averaging import replica_mean as replica_mean
from jaxlib_methods.parallel._sparse_averaging import sparse_averaging as sparse_averaging
from jaxlib_methods.parallel._stages import StageModel as StageModel
from jaxlib_methods.parallel._stages import join_stages as join_stages
from jaxlib_methods.parallel._stages import sequential_loss as sequential_loss
from jaxlib_methods.parallel._stages import split_stages as split_stages
from jaxlib_methods.parallel._subspace import Subspace as Subspace
from jaxlib_methods.parallel._subspace import fixed_embedding as fixed_embedding
from jaxlib_methods.parallel._subspace import random_subspace as random_subspace
from jaxlib_methods.parallel._subspace import subspace_codec as subspace_codec
from jaxlib_methods.parallel._subspace import subspace_coordinates as subspace_coordinates
from jaxlib_methods.parallel._subspace import subspace_gradient_codec as subspace_gradient_codec
from jaxlib_methods.parallel._subspace import subspace_model as subspace_model
from jaxlib_methods.parallel._subspace import subspace_reconstruct as subspace_reconstruct
from jaxlib_methods.parallel._synchronous import SynchronousState as SynchronousState
from jaxlib_methods.parallel._synchronous import synchronous_pipeline as synchronous_pipeline
from jaxlib_methods.parallel._verification import Verifier as Verifier
from jaxlib_methods.parallel._verification import VerifierState as VerifierState
from jaxlib_methods.parallel._verification import init_verifier as init_verifier
from jaxlib_methods.parallel._verification import reroute as reroute
from jaxlib_methods.parallel._verification import verify as verify
from jaxlib_methods.parallel._verification import verify_summaries as verify_summaries

__all__ = [
    "ATTACKS",
    "DISTANCES",
    "LINKS",
    "AsynchronousState",
    "Attack",
    "AttackState",
    "BoundaryHook",
    "Codec",
    "Collective",
    "DataHook",
    "DeltaState",
    "DiLoCoState",
    "FedAvgState",
    "HookInfo",
    "Link",
    "Losses",
    "MomentState",
    "Packed",
    "Payload",
    "Pipeline",
    "Sides",
    "Snapshot",
    "SparseAveragingState",
    "StageCosts",
    "StageModel",
    "StepTime",
    "StreamingDiLoCoState",
    "Subspace",
    "SynchronousState",
    "Traffic",
    "Transform",
    "Verdicts",
    "VerifiedPipeline",
    "VerifiedState",
    "Verifier",
    "VerifierState",
    "adaptive",
    "all_reduce_time",
    "asynchronous_pipeline",
    "averaged_per_round",
    "blocking_floor",
    "bubble_fraction",
    "cast_codec",
    "cast_like",
    "centered_clip",
    "chain_hooks",
    "change_basis",
    "check_attacks",
    "codec_hook",
    "coded_boundary",
    "collectives",
    "collude",
    "coordinate_median",
    "delta_codec",
    "diloco",
    "draw_transform",
    "draw_transforms",
    "ema_weight_schedule",
    "estimate_bridge",
    "expand_reference",
    "extraction_probability",
    "fed_avg",
    "fixed_embedding",
    "geometric_median",
    "gradient_moment",
    "grassmann_step",
    "guard_model",
    "identity_codec",
    "init_attacks",
    "init_verifier",
    "int8_codec",
    "invisible_noise",
    "join_stages",
    "krum_scores",
    "largest_pipeline",
    "link_bytes",
    "make_mesh",
    "master_copy",
    "message_distances",
    "message_summary",
    "morph",
    "morph_snapshot",
    "multi_krum",
    "outer_sgd",
    "payload_bytes",
    "predict_step",
    "random_directions",
    "random_sign",
    "random_subspace",
    "random_values",
    "replica_mean",
    "reroute",
    "schedule_table",
    "sequential_loss",
    "shard_batch",
    "sliced_wasserstein",
    "sparse_averaging",
    "split_microbatches",
    "split_stages",
    "stage_costs",
    "streaming_diloco",
    "subspace_codec",
    "subspace_coordinates",
    "subspace_gradient_codec",
    "subspace_model",
    "subspace_reconstruct",
    "synchronous_pipeline",
    "tamper",
    "top_k_codec",
    "transform_momentum",
    "trimmed_mean",
    "tukey_fence",
    "verification_hook",
    "verify",
    "verify_summaries",
]
