"""Attacks: where they may go, to the last bit; what they compute, against loops in NumPy; and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods import robustness as rb
from jaxlib_methods._core.checks import options_of
from jaxlib_methods.robustness import _feasible
from jaxlib_methods.typing import AttackNorm
from tests.jaxlib_methods.robustness import small_network as net

close = np.testing.assert_allclose
KEY = jax.random.key(5)
OPTIONS = {"radius": 0.1, "step_size": 0.04, "num_steps": 5}


@pytest.fixture(scope="module")
def params():
    return net.network()


# ------------------------------------------------------------------------------------------- the ball and the box


@functools.partial(jax.jit, static_argnames="norm")
def pushed(images, step, epsilon, low, high, norm):
    """Images moved by a step and brought back, as an attack does."""
    return _feasible.project(images + step, _feasible.feasible_set(images, epsilon, low, high, norm), norm)


def test_linf_is_the_exact_ball_and_the_largest_one_of_floats():
    rng = np.random.default_rng(0)
    images = (rng.uniform(-1, 1, (50, 400)) * 10.0 ** rng.integers(-6, 3, (50, 400))).astype(np.float32)
    images[:, :3] = 0, -0.0, 1
    sign = rng.choice([-1, 1], images.shape).astype(np.float32)
    for epsilon in np.float32([0, 1e-5, 8 / 255, 0.1, 0.3, 3.0]):  # float64 holds all differences exactly
        x = np.asarray(pushed(images, sign * 2 * epsilon, epsilon, np.float32(-np.inf), np.float32(np.inf), "linf"))
        moved = lambda x: np.abs(x.astype(np.float64) - images)
        assert (moved(x) <= epsilon).all()
        x = np.asarray(pushed(images, sign * np.float32(1e5), epsilon, np.float32(-1e5), np.float32(1e5), "linf"))
        assert (moved(x) <= epsilon).all() and (np.abs(x) <= 1e5).all()
        assert (moved(np.nextafter(x, np.inf * sign)) > epsilon).all()


@pytest.mark.parametrize("norm", ["l2", "l2_per_channel"])
@pytest.mark.parametrize("shape", [(3, 3, 1), (32, 32, 3)])
def test_l2_is_the_ball_but_for_parts_per_million(norm, shape):
    rng = np.random.default_rng(0)
    images = rng.random((20, *shape)).astype(np.float32)
    step = rng.normal(size=images.shape).astype(np.float32) * np.float32(10.0) ** rng.integers(-3, 4, (20, 1, 1, 1))
    step = step.astype(np.float32)
    axes = (1, 2, 3) if norm == "l2" else (1, 2)
    length = lambda x: np.sqrt(np.square(x.astype(np.float64) - images).sum(axes))
    for epsilon in np.float32([0, 1e-6, 0.05, 0.5, 7.0]):
        x = np.asarray(pushed(images, step, epsilon, np.float32(-np.inf), np.float32(np.inf), norm))
        assert (length(x) <= epsilon).all()
        far = length(images + step) > epsilon
        if epsilon > 0.01:
            assert far.any() and (length(x)[far] > epsilon * (1 - 1e-4)).all()
        boxed = np.asarray(pushed(images, step, epsilon, np.float32(0), np.float32(1), norm))
        assert (length(boxed) <= epsilon).all() and boxed.min() >= 0 and boxed.max() <= 1


@pytest.mark.parametrize("norm", options_of(AttackNorm))
@pytest.mark.parametrize("scaling", [None, rb.HessianNormScaling()], ids=["plain", "hns"])
def test_8_attacks_stay_in_the_ball_and_the_box(params, norm, scaling):
    images, labels = net.batch()
    images = images.at[:8].set(jnp.round(images[:8]))  # at the walls of the box
    epsilon = 0.3 if norm == "linf" else 0.9
    options = OPTIONS | {"radius": epsilon, "step_size": epsilon / 2}
    x = rb.pgd(net.apply, params, images, labels, key=KEY, norm=norm, scaling=scaling, **options).images
    delta = np.asarray(x, np.float64) - np.asarray(images)
    size = np.abs(delta).max() if norm == "linf" else np.sqrt(np.square(delta).sum((1, 2, 3))).max()
    assert 0.5 * epsilon < size <= np.float32(epsilon)
    assert x.min() >= 0 and x.max() <= 1


def test_radius_step_and_box_may_differ_by_channel_and_not_exist(params):
    images, labels = net.batch()
    radius = jnp.linspace(0, 0.3, 4).reshape(4, 1)  # by column
    options = {"num_steps": 5, "bounds": (jnp.zeros((4, 4, 1)), 1.0), "radius": radius, "step_size": 0.1 + radius}
    x = rb.pgd(net.apply, params, images, labels, key=KEY, **options).images
    moved = np.abs(np.asarray(x, np.float64) - np.asarray(images)).max((0, 1))
    assert (moved <= np.asarray(radius)).all() and moved[-1] > 0.29 and moved[0] == 0
    free = rb.pgd(net.apply, params, images, labels, key=KEY, **(options | {"bounds": None})).images
    assert free.min() < 0 and free.max() > 1


# ------------------------------------------------------------------------------------------------- what they compute


def numpy_pgd(params, image, label, epsilon, eta, steps, norm, beta_of):
    """Projected gradient descent on one image in float64, without a random start."""
    start = x = np.asarray(image, np.float64).reshape(-1)
    for _ in range(steps):
        a, J = net.numpy_logits_and_jacobian(params, x)
        beta = beta_of(a, label)
        g = beta * J.T @ (net.numpy_softmax(beta * a) - np.eye(len(a))[label])
        if norm == "linf":
            x = np.clip(x + eta * np.sign(g), start - epsilon, start + epsilon)
        else:
            delta = x + eta * g / np.linalg.norm(g) - start
            x = start + delta * min(1, epsilon / np.linalg.norm(delta))
        x = np.clip(x, 0, 1)
    return x


def numpy_njs(a, label, scale=0.7, rho=0.01):
    p = net.numpy_softmax(scale * a)
    gap = scale * np.ptp(a)
    return scale * (-np.log(rho / ((len(a) - 1) * (1 - rho))) / gap if 1 - p[label] <= rho else 1)


@pytest.mark.contract
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "njs"])
def test_pgd_equals_a_loop_over_images(params, norm, scaled):
    images, labels = net.batch()
    epsilon, eta = (0.1, 0.04) if norm == "linf" else (0.6, 0.25)
    scaling = rb.NetworkJacobianScaling(jnp.float32(0.7)) if scaled else None
    options = {"radius": epsilon, "step_size": eta, "num_steps": 5, "norm": norm, "random_start": False}
    found = rb.pgd(net.apply, params, images, labels, key=KEY, scaling=scaling, **options)
    beta_of = numpy_njs if scaled else lambda a, label: 1.0
    for i in range(len(images)):
        expected = numpy_pgd(params, images[i], int(labels[i]), epsilon, eta, 5, norm, beta_of)
        close(found.images[i].reshape(-1), expected, atol=2e-5)
        a, _ = net.numpy_logits_and_jacobian(params, found.images[i])
        close(found.logits[i], a, rtol=1e-4, atol=1e-5)
        assert bool(found.success[i]) == (a.argmax() != labels[i])


def test_fgsm_is_one_step_of_the_size_of_the_ball(params):
    images, labels = net.batch()
    one = rb.pgd(net.apply, params, images, labels, key=KEY, radius=0.1, step_size=0.1, num_steps=1)
    assert (rb.fgsm(net.apply, params, images, labels, key=KEY, radius=0.1).images == one.images).all()
    assert (rb.fgsm(net.apply, params, images, labels, key=KEY, radius=0.0).images == images).all()


@pytest.mark.parametrize("name", ["plain", "njs", "hns"])
def test_success_grows_with_epsilon(params, name):
    images, labels = net.batch(count=64)
    scaling = {
        "plain": None,
        "njs": rb.NetworkJacobianScaling(jnp.float32(0.3)),
        "hns": rb.HessianNormScaling(),
    }[name]
    radii = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
    attack = lambda e: rb.pgd(
        net.apply, params, images, labels, key=KEY, radius=e, step_size=e / 4 + 1e-6, num_steps=5, scaling=scaling
    )
    rates = [float(attack(e).success.mean()) for e in radii]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] > 0.9


def test_restarts_keep_the_first_success(params):
    images, labels = net.batch(count=64)
    options = {"radius": 0.05, "step_size": 0.02, "num_steps": 2}
    many = rb.pgd(net.apply, params, images, labels, key=KEY, num_restarts=6, **options)
    runs = [rb.pgd(net.apply, params, images, labels, key=key, **options) for key in jax.random.split(KEY, 6)]
    success = np.stack([run.success for run in runs])
    assert (many.success == success.any(0)).all() and success.any(0).sum() > success[0].sum() > 0
    chosen = np.where(success.any(0), success.argmax(0), 5)
    close(many.images, np.stack([run.images for run in runs])[chosen, np.arange(64)], atol=1e-6)


def test_a_sharded_batch_is_attacked_where_it_lies(params):
    images, labels = net.batch()
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    options = OPTIONS | {"scaling": rb.HessianNormScaling()}  # it has all parts: Jacobians, gradients, projections
    alone = rb.pgd(net.apply, params, images, labels, key=KEY, **options)
    everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spread = rb.pgd(net.apply, everywhere, *jax.device_put((images, labels), rows), key=KEY, **options)
    assert spread.images.sharding.is_equivalent_to(rows, 4)
    close(spread.images, alone.images, atol=1e-6)
    assert (spread.success == alone.success).all()


def test_an_attack_is_compiled_once_and_works_inside_jit(params):
    images, labels = net.batch()
    traces = []

    def apply(params, x):
        traces.append(None)
        return net.apply(params, x)

    attack = lambda e: rb.pgd(apply, params, images, labels, key=KEY, radius=e, step_size=0.05, num_steps=3)
    first = attack(0.1)
    count = len(traces)
    attack(0.2)
    assert len(traces) <= count + 1  # the shape of the logits is looked at
    inside = jax.jit(lambda p, x, k, e: rb.pgd(net.apply, p, x, k, key=KEY, radius=e, step_size=0.05, num_steps=3))
    assert (inside(params, images, labels, 0.1).images == first.images).all()


# ------------------------------------------------------------------------------------------------------- diagnostics


def test_masking_is_diagnosed_image_by_image(params):
    images, labels = net.batch()
    labels = labels.at[0].set((labels[0] + 1) % 5)
    hidden = params | {"second": 1e4 * params["second"]}
    found = rb.gradient_masking(net.apply, hidden, images, labels)
    a = np.asarray(net.apply(hidden, images))
    ordered = np.sort(a, axis=1)
    close(found.logit_gap, ordered[:, -1] - ordered[:, -2], rtol=1e-5)
    close(found.logit_range, ordered[:, -1] - ordered[:, 0], rtol=1e-5)
    assert found.error_signal[0] == 1 and 0.8 < found.vanished < 1 and found.gradient_norm[0] > 1
    for i in (0, 3):
        expected = np.linalg.svd(net.numpy_logits_and_jacobian(hidden, images[i])[1], compute_uv=False)
        close(found.singular_values[i], expected, rtol=1e-4)
    cured = rb.gradient_masking(net.apply, hidden, images, labels, logit_scale=1e-4)
    assert cured.vanished == 0 and cured.gradient_norm.min() > 1e-3
    for i in (1, 5):
        a, J = net.numpy_logits_and_jacobian(hidden, images[i])
        g = 1e-4 * J.T @ (net.numpy_softmax(1e-4 * a) - np.eye(5)[labels[i]])
        close(cured.gradient_norm[i], np.linalg.norm(g), rtol=1e-4)
    assert rb.gradient_masking(net.apply, hidden, images, labels, logit_scale=1e-4, threshold=1e9).vanished == 1


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"radius": -0.1}, ValueError, "radius must not be negative, got -0.1"),
        ({"radius": float("nan")}, ValueError, "radius must not be negative, got nan"),
        ({"radius": jnp.ones((3, 1))}, ValueError, r"radius must broadcast to the images \(32, 4, 4, 1\)"),
        ({"radius": jnp.ones(1), "norm": "l2"}, ValueError, "radius of an L2 norm must be a number"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive, got 0.0"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_restarts": 0}, ValueError, "num_restarts must be at least 1, got 0"),
        ({"norm": "l1"}, ValueError, r"norm must be one of 'linf', 'l2', 'l2_per_channel', got 'l1'"),
        ({"bounds": (0.2, 1.0)}, ValueError, "images must lie in the box"),
        ({"scaling": -1.0}, ValueError, "scaling must be positive, got -1.0"),
        ({"scaling": rb.NetworkJacobianScaling(1.0, 0.9)}, ValueError, r"min_error must lie in \(0, 0.8\), got 0.9"),
    ],
)
def test_bad_options_are_named(params, changes, error, message):
    images, labels = net.batch()
    with pytest.raises(error, match=message):
        rb.pgd(net.apply, params, images, labels, key=KEY, **(OPTIONS | changes))


def test_bad_arrays_and_networks_are_named(params):
    images, labels = net.batch()
    attack = functools.partial(rb.pgd, key=KEY, **OPTIONS)
    with pytest.raises(TypeError, match="images must be float32 or float64, got uint8"):
        attack(net.apply, params, np.uint8(255 * images), labels)
    with pytest.raises(TypeError, match="labels must be integers"):
        attack(net.apply, params, images, labels.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\]"):
        attack(net.apply, params, images, labels + 1)
    with pytest.raises(ValueError, match=r"images must be \[batch, ...\] and labels \[batch\]"):
        attack(net.apply, params, images, labels[:3])
    with pytest.raises(ValueError, match="apply_fn must return logits"):
        attack(lambda params, x: net.apply(params, x)[0], params, images, labels)
    with pytest.raises(ValueError, match="at least two logits, got 1"):
        attack(lambda params, x: net.apply(params, x)[:, :1], params, images, labels)
    broken = params | {"bias": params["bias"].at[0].set(jnp.nan)}
    with pytest.raises(ValueError, match="logits that are NaN or infinite"):
        attack(net.apply, broken, images, labels)
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        rb.gradient_masking(net.apply, broken, images, labels)
    with pytest.raises(ValueError, match="mean singular value of the logits' Jacobian is 0"):
        rb.network_jacobian_scaling(net.apply, jax.tree.map(jnp.zeros_like, params), images)
    with pytest.raises(ValueError, match="needs images, got none"):
        rb.network_jacobian_scaling(net.apply, params, images[:0])
    with pytest.raises(ValueError, match=r"min_error must lie in \(0, 0.5\)"):
        rb.scaling.confidence_scale(1.0, 2, min_error=0.6)
    with pytest.raises(ValueError, match="num_points must be at least 3"):
        rb.HessianNormScaling(num_points=2)
