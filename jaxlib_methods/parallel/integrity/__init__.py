"""Who sends what across a boundary: SENTINEL's verifiers, the attacks they are tested with, robust aggregation."""

from jaxlib_methods.parallel.integrity._attacks import (
    ATTACKS as ATTACKS,
    Attack as Attack,
    AttackState as AttackState,
    adaptive as adaptive,
    check_attacks as check_attacks,
    collude as collude,
    init_attacks as init_attacks,
    invisible_noise as invisible_noise,
    random_sign as random_sign,
    random_values as random_values,
    tamper as tamper,
)
from jaxlib_methods.parallel.integrity._message_distances import (
    DISTANCES as DISTANCES,
    expand_reference as expand_reference,
    message_distances as message_distances,
    message_summary as message_summary,
    random_directions as random_directions,
    sliced_wasserstein as sliced_wasserstein,
    tukey_fence as tukey_fence,
)
from jaxlib_methods.parallel.integrity._robust_aggregation import (
    centered_clip as centered_clip,
    coordinate_median as coordinate_median,
    geometric_median as geometric_median,
    krum_scores as krum_scores,
    multi_krum as multi_krum,
    trimmed_mean as trimmed_mean,
)
from jaxlib_methods.parallel.integrity._sentinel import (
    guard_model as guard_model,
    share_bans as share_bans,
    verification_hook as verification_hook,
)
from jaxlib_methods.parallel.integrity._verification import (
    Verifier as Verifier,
    VerifierState as VerifierState,
    init_verifier as init_verifier,
    reroute as reroute,
    verify as verify,
    verify_summaries as verify_summaries,
)
from jaxlib_methods.parallel.integrity._verified_pipeline import (
    Verdicts as Verdicts,
    VerifiedPipeline as VerifiedPipeline,
    VerifiedState as VerifiedState,
)

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
