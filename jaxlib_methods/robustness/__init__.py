r"""Attacks on classifiers that see through saturated logits, and what tells robustness from hidden gradients.

    options = dict(epsilon=8 / 255, step_size=2 / 255, steps=20)
    plain = pgd(apply, params, images, labels, key, **options)                               # PGD
    njs = network_jacobian_scaling(apply, params, some_images)                               # once for a network
    stronger = pgd(apply, params, images, labels, key, scaling=njs, **options)               # PGD++ (NJS)
    stronger = pgd(apply, params, images, labels, key, scaling=HessianNormScaling(), **options)  # PGD++ (HNS)
    stronger.success.mean(), gradient_masking(apply, params, images, labels).vanished

`apply(params, images)` returns logits [batch, d]. A network with binary weights has logits so far apart that the
softmax is exactly 0 or 1 in float32: no gradient reaches the image, and an attack by gradients fails, without the
network being robust. One positive factor on the logits before the cross-entropy changes no prediction and brings the
gradients back.

| attack | call |
| --- | --- |
| FGSM, PGD (L-infinity, L2) | `fgsm`, `pgd` |
| temperature scaling with a given beta | `scaling=0.1` |
| FGSM++, PGD++ with network Jacobian scaling | `scaling=network_jacobian_scaling(...)` |
| FGSM++, PGD++ with Hessian-norm scaling | `scaling=HessianNormScaling()` |
"""

from jaxlib_methods.robustness._attacks import AttackResult as AttackResult, fgsm as fgsm, pgd as pgd
from jaxlib_methods.robustness._masking import GradientMasking as GradientMasking, gradient_masking as gradient_masking
from jaxlib_methods.robustness._scaling import (
    HessianNormScaling as HessianNormScaling,
    NetworkJacobianScaling as NetworkJacobianScaling,
    confidence_temperature as confidence_temperature,
    hessian_norm_temperature as hessian_norm_temperature,
    jacobian_singular_values as jacobian_singular_values,
    log_hessian_norm as log_hessian_norm,
    logit_jacobian as logit_jacobian,
    network_jacobian_scaling as network_jacobian_scaling,
    network_jacobian_temperature as network_jacobian_temperature,
)

__all__ = [
    "AttackResult",
    "GradientMasking",
    "HessianNormScaling",
    "NetworkJacobianScaling",
    "confidence_temperature",
    "fgsm",
    "gradient_masking",
    "hessian_norm_temperature",
    "jacobian_singular_values",
    "log_hessian_norm",
    "logit_jacobian",
    "network_jacobian_scaling",
    "network_jacobian_temperature",
    "pgd",
]
