"""Pipelines over a mesh of devices, and a model of how long they take over slow links.

BibTeX:

@article{dolatabadi2026sentinel,
  title = {{SENTINEL}: Stagewise Integrity Verification for Pipeline Parallel Decentralized Training},
  author = {Dolatabadi, Hadi Mohaghegh and Ajanthan, Thalaiyasingam and Ramasinghe, Sameera and
    Hewa Koneputugodage, Chamin and Avraham, Gil and Zuo, Yan and Shevchenko, Violetta and Long, Alexander},
  journal = {arXiv preprint arXiv:2603.03592},
  year = {2026},
}
"""

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
from jaxlib_methods.parallel._collectives import Collective as Collective
from jaxlib_methods.parallel._collectives import collectives as collectives
from jaxlib_methods.parallel._collectives import link_bytes as link_bytes
from jaxlib_methods.parallel._links import LINKS as LINKS
from jaxlib_methods.parallel._links import Link as Link
from jaxlib_methods.parallel._links import StageCosts as StageCosts
from jaxlib_methods.parallel._links import StepTime as StepTime
from jaxlib_methods.parallel._links import all_reduce_time as all_reduce_time
from jaxlib_methods.parallel._links import blocking_floor as blocking_floor
from jaxlib_methods.parallel._links import largest_pipeline as largest_pipeline
from jaxlib_methods.parallel._links import predict_step as predict_step
from jaxlib_methods.parallel._links import stage_costs as stage_costs
from jaxlib_methods.parallel._message_distances import DISTANCES as DISTANCES
from jaxlib_methods.parallel._message_distances import expand_reference as expand_reference
from jaxlib_methods.parallel._message_distances import message_distances as message_distances
from jaxlib_methods.parallel._message_distances import message_summary as message_summary
from jaxlib_methods.parallel._message_distances import random_directions as random_directions
from jaxlib_methods.parallel._message_distances import sliced_wasserstein as sliced_wasserstein
from jaxlib_methods.parallel._message_distances import tukey_fence as tukey_fence
from jaxlib_methods.parallel._robust_aggregation import centered_clip as centered_clip
from jaxlib_methods.parallel._robust_aggregation import coordinate_median as coordinate_median
from jaxlib_methods.parallel._robust_aggregation import geometric_median as geometric_median
from jaxlib_methods.parallel._robust_aggregation import krum_scores as krum_scores
from jaxlib_methods.parallel._robust_aggregation import multi_krum as multi_krum
from jaxlib_methods.parallel._robust_aggregation import trimmed_mean as trimmed_mean
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
    "Attack",
    "AttackState",
    "Collective",
    "Link",
    "StageCosts",
    "StepTime",
    "Verifier",
    "VerifierState",
    "adaptive",
    "all_reduce_time",
    "blocking_floor",
    "centered_clip",
    "check_attacks",
    "collectives",
    "collude",
    "coordinate_median",
    "expand_reference",
    "geometric_median",
    "init_attacks",
    "init_verifier",
    "invisible_noise",
    "krum_scores",
    "largest_pipeline",
    "link_bytes",
    "message_distances",
    "message_summary",
    "multi_krum",
    "predict_step",
    "random_directions",
    "random_sign",
    "random_values",
    "reroute",
    "sliced_wasserstein",
    "stage_costs",
    "tamper",
    "trimmed_mean",
    "tukey_fence",
    "verify",
    "verify_summaries",
]
