"""Mean field against its definition, and the solvers as layers of a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from jaxlib_methods import message_passing as mp


@pytest.mark.contract
def test_mean_field_is_its_definition(key):
    unaries = jax.random.uniform(key, (3, 4, 3), maxval=4.0)
    table = jax.random.uniform(jax.random.fold_in(key, 1), (3, 3), maxval=3.0)
    weights = jax.random.uniform(jax.random.fold_in(key, 2), (8, 3, 4))
    found = mp.mean_field(
        mp.GridMRF(unaries, mp.potentials.table(table), weights), num_iterations=2, num_directions=8
    ).beliefs
    theta, v, w = np.asarray(unaries), np.asarray(table), np.asarray(weights)
    c = theta
    for _ in range(2):
        q = np.exp(-c) / np.exp(-c).sum(-1, keepdims=True)
        c = theta.copy()
        for i in range(3):
            for j in range(4):
                for d, (down, right) in enumerate(mp.grid.DIRECTIONS[:8]):
                    if 0 <= i - down < 3 and 0 <= j - right < 4:
                        cost = v if d % 2 == 0 else v.T
                        c[i, j] += w[d, i, j] * (q[i - down, j - right] @ cost) / 8
    np.testing.assert_allclose(found, c, rtol=1e-5)


@pytest.mark.parametrize(("directions", "energies"), [(4, [3121904, 1620684]), (8, [2322319, 504815])])
def test_mean_field_energies_of_tsukuba(shared_data, directions, energies):
    folder = shared_data / "stereo" / "tsukuba"
    left, right = (np.asarray(Image.open(next(folder.glob(f"*{side}*")))) for side in ("left", "right"))
    mrf = mp.GridMRF(mp.costs.birchfield_tomasi(left, right, 16), mp.potentials.truncated_linear(20.0, truncation=2))
    found = mp.mean_field(mrf, num_directions=directions, evaluate=True).energies
    np.testing.assert_allclose([found[0], found[-1]], energies, rtol=5e-4)


def test_mean_field_gradient_is_the_same_with_rematerialisation(key, x64):
    mrf = mp.GridMRF(
        jax.random.normal(key, (2, 3, 4, 3), jnp.float64), mp.potentials.table(jnp.ones((3, 3)) - jnp.eye(3))
    )
    gradient = lambda remat: jax.grad(lambda m: jnp.sin(mp.mean_field(m, num_iterations=3, remat=remat).beliefs).sum())(
        mrf
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), gradient(False), gradient(True))


def noisy_stripes(key):
    """Vertical stripes of three labels under heavy noise."""
    labels = jnp.broadcast_to((jnp.arange(12) // 4)[None, None], (2, 8, 12))
    return 1.5 * jax.nn.one_hot(labels, 3) + jax.random.normal(key, (2, 8, 12, 3)), labels


@pytest.mark.parametrize("method", ["trwp", "isgmr", "mean_field"])
def test_layer_learns_compatibilities_that_remove_noise(key, method):
    logits, labels = noisy_stripes(key)
    layer = mp.MessagePassing(3, method=method, num_iterations=3, init_weight=0.1)
    optimizer = nnx.Optimizer(layer, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda m: optax.softmax_cross_entropy_with_integer_labels(m(logits), labels).mean()
        value, gradient = nnx.value_and_grad(loss)(layer)
        with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to its int32 counter
            optimizer.update(layer, gradient)
        return value

    losses = [float(step(layer, optimizer)) for _ in range(30)]
    accuracy = lambda x: float((x.argmax(-1) == labels).mean())
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy(layer(logits)) > accuracy(logits) + 0.1
    table = layer.compatibility()
    np.testing.assert_array_equal(table, table.T)
    assert (jnp.diag(table) == 0).all() and (table >= 0).all()
    # Stripes 0 and 2 never touch, so their cost has no reason to fall with the others.
    assert table[0, 2] >= table[0, 1]


def test_layer_starts_as_potts_and_takes_edge_weights(key):
    logits, _ = noisy_stripes(key)
    layer = mp.MessagePassing(3, num_iterations=2, init_weight=0.7)
    weights = mp.boundary_weights(jax.random.uniform(key, (2, 8, 12)))
    mrf = mp.GridMRF(logits.max(-1, keepdims=True) - logits, mp.potentials.potts(0.7), weights)
    np.testing.assert_allclose(layer(logits, weights), -mp.trwp(mrf, num_iterations=2).beliefs, atol=1e-5)
    gradient = jax.grad(lambda w: layer(logits, w)[..., 0].sum())(weights)
    assert jnp.isfinite(gradient).all() and (gradient != 0).any()


def test_layer_keeps_the_dtype_of_its_logits(key):
    logits = noisy_stripes(key)[0]
    layer = mp.MessagePassing(3, method="mean_field", num_iterations=2)
    half = layer(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), layer(logits), atol=0.1)


@pytest.mark.parametrize("directions", [4, 8, 16])
def test_boundary_weights_cut_every_edge_of_a_boundary_pixel(directions):
    boundaries = jnp.zeros((4, 5)).at[1, 2].set(1.0)
    weights = mp.boundary_weights(boundaries, num_directions=directions)
    for d, (down, right) in enumerate(mp.grid.DIRECTIONS[:directions]):
        for i in range(4):
            for j in range(5):
                exists = 0 <= i - down < 4 and 0 <= j - right < 5
                free = exists and (i, j) != (1, 2) and (i - down, j - right) != (1, 2)
                assert float(weights[d, i, j]) == float(free)


@pytest.mark.parametrize(
    ("options", "message"), [({"method": "sgm"}, "method must be one of"), ({"init_weight": 0.0}, "must be positive")]
)
def test_layer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        mp.MessagePassing(3, **options)
