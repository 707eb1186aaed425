"""Who sends what across a boundary: SENTINEL's verifiers, the attacks they are tested with, robust aggregation."""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.parallel.integrity import (
    aggregation as aggregation,
    attacks as attacks,
    distances as distances,
)
from jaxlib_methods.parallel.integrity.attacks import Attack as Attack
from jaxlib_methods.parallel.integrity.bans import find_verifiers as find_verifiers, share_bans as share_bans
from jaxlib_methods.parallel.integrity.sentinel import (
    guard_model as guard_model,
    verification_hook as verification_hook,
)
from jaxlib_methods.parallel.integrity.simulation import VerifiedPipeline as VerifiedPipeline
from jaxlib_methods.parallel.integrity.verification import verify as verify
from jaxlib_methods.parallel.integrity.verifiers import (
    VerifierConfig as VerifierConfig,
    VerifierState as VerifierState,
    init_verifier as init_verifier,
)

__all__ = [
    "Attack",
    "VerifiedPipeline",
    "VerifierConfig",
    "VerifierState",
    "aggregation",
    "attacks",
    "distances",
    "find_verifiers",
    "guard_model",
    "init_verifier",
    "share_bans",
    "verification_hook",
    "verify",
]

moved_names(
    __name__,
    {
        "ATTACKS": "parallel.integrity.attacks.ATTACKS",
        "DISTANCES": "parallel.integrity.distances.DISTANCES",
        "AttackState": "parallel.integrity.attacks.AttackState",
        "Verdicts": "parallel.integrity.simulation.Verdicts",
        "VerifiedState": "parallel.integrity.simulation.VerifiedState",
        "Verifier": "parallel.integrity.VerifierConfig",
        "adaptive": "parallel.integrity.tampering.adaptive",
        "centered_clip": "parallel.integrity.aggregation.centered_clip",
        "check_attacks": "parallel.integrity.attacks.check_attacks",
        "collude": "parallel.integrity.tampering.collude",
        "coordinate_median": "parallel.integrity.aggregation.coordinate_median",
        "expand_reference": "parallel.integrity.distances.expand_reference",
        "geometric_median": "parallel.integrity.aggregation.geometric_median",
        "init_attacks": "parallel.integrity.attacks.init_attacks",
        "invisible_noise": "parallel.integrity.tampering.invisible_noise",
        "krum_scores": "parallel.integrity.aggregation.krum_scores",
        "message_distances": "parallel.integrity.distances.message_distances",
        "message_summary": "parallel.integrity.distances.message_summary",
        "multi_krum": "parallel.integrity.aggregation.multi_krum",
        "random_directions": "parallel.integrity.distances.random_directions",
        "random_sign": "parallel.integrity.tampering.random_sign",
        "random_values": "parallel.integrity.tampering.random_values",
        "reroute": "parallel.integrity.verification.reroute",
        "sliced_wasserstein": "parallel.integrity.distances.sliced_wasserstein",
        "tamper": "parallel.integrity.attacks.tamper",
        "trimmed_mean": "parallel.integrity.aggregation.trimmed_mean",
        "tukey_fence": "parallel.integrity.distances.tukey_fence",
        "verify_summaries": "parallel.integrity.verification.verify_summaries",
    },
)
