"""Who sends what across a boundary: SENTINEL's verifiers, the attacks they are tested with, robust aggregation.

BibTeX:

@article{dolatabadi2026sentinel,
  title = {{SENTINEL}: Stagewise Integrity Verification for Pipeline Parallel Decentralized Training},
  author = {Dolatabadi, Hadi Mohaghegh and Ajanthan, Thalaiyasingam and Ramasinghe, Sameera and
    Hewa Koneputugodage, Chamin and Avraham, Gil and Zuo, Yan and Shevchenko, Violetta and Long, Alexander},
  journal = {arXiv preprint arXiv:2603.03592},
  year = {2026},
}
"""

from jaxlib_methods.parallel.integrity._attacks import ATTACKS as ATTACKS
from jaxlib_methods.parallel.integrity._attacks import Attack as Attack
from jaxlib_methods.parallel.integrity._attacks import AttackState as AttackState
from jaxlib_methods.parallel.integrity._attacks import adaptive as adaptive
from jaxlib_methods.parallel.integrity._attacks import check_attacks as check_attacks
from jaxlib_methods.parallel.integrity._attacks import collude as collude
from jaxlib_methods.parallel.integrity._attacks import init_attacks as init_attacks
from jaxlib_methods.parallel.integrity._attacks import invisible_noise as invisible_noise
from jaxlib_methods.parallel.integrity._attacks import random_sign as random_sign
from jaxlib_methods.parallel.integrity._attacks import random_values as random_values
from jaxlib_methods.parallel.integrity._attacks import tamper as tamper
from jaxlib_methods.parallel.integrity._message_distances import DISTANCES as DISTANCES
from jaxlib_methods.parallel.integrity._message_distances import expand_reference as expand_reference
from jaxlib_methods.parallel.integrity._message_distances import message_distances as message_distances
from jaxlib_methods.parallel.integrity._message_distances import message_summary as message_summary
from jaxlib_methods.parallel.integrity._message_distances import random_directions as random_directions
from jaxlib_methods.parallel.integrity._message_distances import sliced_wasserstein as sliced_wasserstein
from jaxlib_methods.parallel.integrity._message_distances import tukey_fence as tukey_fence
from jaxlib_methods.parallel.integrity._robust_aggregation import centered_clip as centered_clip
from jaxlib_methods.parallel.integrity._robust_aggregation import coordinate_median as coordinate_median
from jaxlib_methods.parallel.integrity._robust_aggregation import geometric_median as geometric_median
from jaxlib_methods.parallel.integrity._robust_aggregation import krum_scores as krum_scores
from jaxlib_methods.parallel.integrity._robust_aggregation import multi_krum as multi_krum
from jaxlib_methods.parallel.integrity._robust_aggregation import trimmed_mean as trimmed_mean
from jaxlib_methods.parallel.integrity._sentinel import guard_model as guard_model
from jaxlib_methods.parallel.integrity._sentinel import share_bans as share_bans
from jaxlib_methods.parallel.integrity._sentinel import verification_hook as verification_hook
from jaxlib_methods.parallel.integrity._verification import Verifier as Verifier
from jaxlib_methods.parallel.integrity._verification import VerifierState as VerifierState
from jaxlib_methods.parallel.integrity._verification import init_verifier as init_verifier
from jaxlib_methods.parallel.integrity._verification import reroute as reroute
from jaxlib_methods.parallel.integrity._verification import verify as verify
from jaxlib_methods.parallel.integrity._verification import verify_summaries as verify_summaries
from jaxlib_methods.parallel.integrity._verified_pipeline import Verdicts as Verdicts
from jaxlib_methods.parallel.integrity._verified_pipeline import VerifiedPipeline as VerifiedPipeline
from jaxlib_methods.parallel.integrity._verified_pipeline import VerifiedState as VerifiedState

__all__ = [
    "ATTACKS",
    "DISTANCES",
    "Attack",
    "AttackState",
    "Verdicts",
    "VerifiedPipeline",
    "VerifiedState",
    "Verifier",
    "VerifierState",
    "adaptive",
    "centered_clip",
    "check_attacks",
    "collude",
    "coordinate_median",
    "expand_reference",
    "geometric_median",
    "guard_model",
    "init_attacks",
    "init_verifier",
    "invisible_noise",
    "krum_scores",
    "message_distances",
    "message_summary",
    "multi_krum",
    "random_directions",
    "random_sign",
    "random_values",
    "reroute",
    "share_bans",
    "sliced_wasserstein",
    "tamper",
    "trimmed_mean",
    "tukey_fence",
    "verification_hook",
    "verify",
    "verify_summaries",
]
