r"""Attacks on classifiers that see through saturated logits, and what tells robustness from hidden gradients.

    options = dict(key=key, radius=8 / 255, step_size=2 / 255, num_steps=20)
    plain = pgd(apply_fn, params, images, labels, **options)                               # PGD
    njs = network_jacobian_scaling(apply_fn, params, some_images)                               # once for a network
    stronger = pgd(apply_fn, params, images, labels, scaling=njs, **options)               # PGD++ (NJS)
    stronger = pgd(apply_fn, params, images, labels, scaling=HessianNormScaling(), **options)  # PGD++ (HNS)
    stronger.success.mean(), gradient_masking(apply_fn, params, images, labels).vanished

`apply_fn(params, images)` returns logits [batch, d]. A network with binary weights has logits so far apart that the
softmax is exactly 0 or 1 in float32: no gradient reaches the image, and an attack by gradients fails, without the
network being robust. One positive factor on the logits before the cross-entropy changes no prediction and brings the
gradients back.

| attack | call |
| --- | --- |
| FGSM, PGD (L-infinity, L2) | `fgsm`, `pgd` |
| a given factor on the logits | `scaling=0.1` |
| FGSM++, PGD++ with network Jacobian scaling | `scaling=network_jacobian_scaling(...)` |
| FGSM++, PGD++ with Hessian-norm scaling | `scaling=HessianNormScaling()` |

`attacks`, `scaling`, `jacobians` and `masking` hold what these are made of, and the results' types.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.robustness import (
    attacks as attacks,
    jacobians as jacobians,
    masking as masking,
    scaling as scaling,
)
from jaxlib_methods.robustness.attacks import (
    fgsm as fgsm,
    pgd as pgd,
)
from jaxlib_methods.robustness.masking import (
    gradient_masking as gradient_masking,
)
from jaxlib_methods.robustness.scaling import (
    HessianNormScaling as HessianNormScaling,
    NetworkJacobianScaling as NetworkJacobianScaling,
    network_jacobian_scaling as network_jacobian_scaling,
)

__all__ = [
    "HessianNormScaling",
    "NetworkJacobianScaling",
    "fgsm",
    "gradient_masking",
    "network_jacobian_scaling",
    "pgd",
]

moved_names(
    __name__,
    {
        "AttackResult": "robustness.attacks.AttackResult",
        "GradientMasking": "robustness.masking.GradientMaskingResult",
        "confidence_temperature": "robustness.scaling.confidence_scale",
        "hessian_norm_temperature": "robustness.scaling.hessian_norm_scale",
        "jacobian_singular_values": "robustness.jacobians.logit_singular_values",
        "log_hessian_norm": "robustness.scaling.log_hessian_norm",
        "logit_jacobian": "robustness.jacobians.logit_jacobian",
        "network_jacobian_temperature": "robustness.scaling.network_jacobian_scale",
    },
)
