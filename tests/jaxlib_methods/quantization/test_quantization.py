"""Quantized training from end to end: label sets by path, all containers, wrappers, exact resume, what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import citation, models, quantization as qn, trees

GROWS = qn.inverse_temperature_schedule(1.2, 2, maximum=1e4)
SHARP = qn.inverse_temperature_schedule(1.2, 2, maximum=1e35)


def lattice_of(projection, labels=qn.labels.BINARY):
    return qn.Lattice(labels, (("scale", None),), projection)


# method -> (projection, optimizer for a lattice)
METHODS = {
    "pmf double": ("softmax", lambda lattice: qn.proximal_mean_field(0.05, lattice, inverse_temperature=GROWS)),
    "pmf exact": (
        "softmax",
        lambda lattice: qn.proximal_mean_field(0.05, lattice, inverse_temperature=GROWS, jacobian="exact"),
    ),
    "gd-tanh": ("tanh", lambda lattice: qn.proximal_mean_field(0.05, lattice, inverse_temperature=GROWS)),
    "pgd": ("sparsemax", lambda lattice: qn.projected_gradient(0.02, lattice, inverse_temperature=1.0)),
    "icm": ("argmax", lambda lattice: qn.icm(0.02, lattice)),
    "md-softmax-s": ("softmax", lambda lattice: qn.stable_mirror_descent(0.02, lattice, inverse_temperature=SHARP)),
    "md-tanh-s": ("tanh", lambda lattice: qn.stable_mirror_descent(0.02, lattice, inverse_temperature=SHARP)),
    "md-softmax": ("softmax", lambda lattice: qn.mirror_descent(0.05, lattice, inverse_temperature=1.0)),
    "md-tanh": ("tanh", lambda lattice: qn.mirror_descent(0.05, lattice, inverse_temperature=1.0)),
    "straight-through": ("round", lambda lattice: qn.straight_through(0.02, lattice)),
    "binary-connect": ("round", lambda lattice: qn.binary_connect(0.02, lattice)),
}


def problem():
    """A binary network's outputs, so that a binary network fits them exactly; the scale is an ordinary weight."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
    teacher = jnp.asarray(rng.choice([-1.0, 1.0], size=(12, 5)), jnp.float32)
    return {"kernel": jnp.zeros((12, 5)), "scale": jnp.full((5,), 0.5, jnp.float32)}, x, x @ teacher * 2.0, teacher


def loss_of(weights, x, y):
    return jnp.mean((x @ weights["kernel"] * weights["scale"][None] - y) ** 2)


def train(name, steps=60, *, through=False, start=None):
    """Trains and returns (variables, optimizer state, lattice); `through`: gradients through the projection."""
    projection, make = METHODS[name]
    lattice = lattice_of(projection)
    params, x, y, _ = problem()
    optimizer = make(lattice)
    literal = name in ("md-softmax", "md-tanh")
    beta_of = (
        qn.read_inverse_temperature if name not in ("icm", "straight-through", "binary-connect") else lambda _: 1.0
    )
    read = (
        (lambda aux, beta: qn.auxiliary.primal_to_weights(aux, lattice))
        if literal
        else (lambda aux, beta: qn.project(aux, lattice, beta))
    )

    @jax.jit
    def step(aux, state):
        beta = beta_of(state)
        if through:
            grads = jax.grad(lambda aux: loss_of(read(aux, beta), x, y))(aux)
        else:
            grads = jax.grad(loss_of)(read(aux, beta), x, y)
        updates, state = optimizer.update(grads, state, aux)
        return optax.apply_updates(aux, updates), state

    if start is None:
        aux = qn.init_auxiliary(params, lattice, key=jax.random.key(0))
        aux = qn.auxiliary.auxiliary_to_primal(aux, lattice) if literal else aux
        start = aux, optimizer.init(aux)
    aux, state = start
    for _ in range(steps):
        aux, state = step(aux, state)
    assert step._cache_size() == 1  # beta grew, and nothing was compiled again
    return aux, state, lattice


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_the_binary_network(name):
    aux, _, lattice = train(name)
    network = qn.quantize(aux, lattice)
    assert network["kernel"].shape == (12, 5) and set(np.unique(network["kernel"])) == {-1.0, 1.0}
    np.testing.assert_array_equal(network["kernel"], problem()[3])
    assert not np.isin(network["scale"], (-1.0, 1.0)).any()  # an excluded leaf is trained as it is


@pytest.mark.parametrize("name", ["pmf double", "pgd", "icm", "md-softmax-s", "md-tanh-s", "md-softmax"])
def test_gradients_in_the_weights_and_through_the_projection_are_interchangeable(name):
    a, b = train(name, 5)[0], train(name, 5, through=True)[0]
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pmf double", "md-tanh"])
def test_resuming_from_a_copy_of_the_state_gives_the_same_bits(name):
    whole = train(name, 9)[:2]
    half = train(name, 4)[:2]
    leaves, structure = jax.tree.flatten(half)
    restored = structure.unflatten([jnp.asarray(np.array(leaf)) for leaf in leaves])
    for ours, theirs in zip(jax.tree.leaves(train(name, 5, start=restored)[:2]), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_state_holds_the_inverse_temperature_of_the_next_step():
    _, state, _ = train("pmf double", 5)
    assert float(qn.read_inverse_temperature(state)) == pytest.approx(1.2**3)  # ceil(5 / 2)
    assert 0 <= float(qn.lattice.label_share(train("md-tanh-s", 1)[0], lattice_of("tanh"))) < 0.2
    aux, state, lattice = train("md-tanh-s", 200)
    assert float(qn.lattice.label_share(qn.project(aux, lattice, qn.read_inverse_temperature(state)), lattice)) == 1.0


def test_numpy_arrays_as_a_checkpoint_gives_them():
    lattice = qn.Lattice(projection="tanh")
    x = np.float32([[0.3, -0.1]])
    network = qn.quantize({"w": x}, lattice)
    np.testing.assert_array_equal(network["w"], [[1, -1]])
    np.testing.assert_array_equal(qn.unpack(qn.pack(jax.device_get(network), lattice))["w"], [[1, -1]])
    assert qn.project({"w": x}, lattice, 1e6)["w"].tolist() == [[1, -1]]


def test_label_sets_by_path_the_first_rule_wins():
    rules = (("bn/", None), ("^head/", (-1, 0, 1)), ("wide", (-2, -1, 1, 2)))
    lattice = qn.Lattice((0.25, -0.5), rules, "softmax")
    params = {
        "body": {"kernel": jnp.zeros((3, 3, 4, 8)), "wide": jnp.zeros(6)},
        "bn": {"scale": jnp.full(8, 1.5, jnp.float32)},
        "head": {"kernel": jnp.zeros((8, 2))},
    }
    aux = qn.init_auxiliary(params, lattice, key=jax.random.key(0))
    assert [x.shape for x in jax.tree.leaves(aux)] == [(8,), (2, 3, 3, 4, 8), (4, 6), (3, 8, 2)]
    limit = np.sqrt(6 / (9 * 4 + 9 * 8 * 2))  # the fan-out counts both labels
    largest = float(jnp.abs(aux["body"]["kernel"]).max())
    assert 0.95 * limit < largest <= limit
    network = qn.quantize(aux, lattice)
    assert set(np.unique(network["body"]["kernel"])) == {-0.5, 0.25}
    assert set(np.unique(network["head"]["kernel"])) <= {-1.0, 0.0, 1.0}
    assert set(np.unique(network["body"]["wide"])) <= {-2.0, -1.0, 1.0, 2.0}
    np.testing.assert_array_equal(network["bn"]["scale"], params["bn"]["scale"])
    assert [x.shape for x in jax.tree.leaves(qn.project(aux, lattice, 3.0))] == [
        x.shape for x in jax.tree.leaves(params)
    ]


@pytest.mark.contract
@pytest.mark.parametrize("labels", [(-1, 1), (-1, 0, 1), (-2, -1, 1, 2), (0.3, -0.7, 5.0)])
@pytest.mark.parametrize("projection", ["softmax", "sparsemax", "argmax", "tanh", "round"])
def test_any_label_set_in_any_order_is_reached_exactly(labels, projection):
    lattice = qn.Lattice(labels, projection=projection)
    w = jnp.linspace(-3, 6, 181)
    nearest = np.asarray(labels, np.float32)[np.abs(np.asarray(w)[:, None] - np.asarray(labels)).argmin(1)]
    clear = np.diff(np.sort(np.abs(np.asarray(w)[:, None] - np.asarray(labels)), axis=1)[:, :2])[:, 0] > 1e-3
    aux = qn.auxiliary.weights_to_auxiliary(w, lattice)
    network = qn.quantize(aux, lattice)
    np.testing.assert_array_equal(network[clear], nearest[clear])
    np.testing.assert_allclose(qn.project(aux, lattice, 1e6)[clear], nearest[clear], atol=1e-6)
    qn.lattice.assert_quantized(qn.quantize(aux.astype(jnp.bfloat16), lattice), lattice)


# ------------------------------------------------------------------------------------------- containers and wrappers


def test_an_nnx_network_first_and_last_layer_excluded():
    model = models.create("lenet300", num_classes=3, input_shape=(4, 4, 1), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    lattice = qn.Lattice(qn.labels.TERNARY, (("^dense1/|^dense3/|bias$", None),), "softmax")
    aux = qn.init_auxiliary(params, lattice, key=jax.random.key(0))
    optimizer = qn.proximal_mean_field(1e-2, lattice, inverse_temperature=GROWS)
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    loss = lambda params: jnp.mean((nnx.merge(graph, params)(images) - 1) ** 2)

    @jax.jit
    def step(aux, state):
        grads = jax.grad(loss)(qn.project(aux, lattice, qn.read_inverse_temperature(state)))
        updates, state = optimizer.update(grads, state, aux)
        return optax.apply_updates(aux, updates), state

    after, _ = step(aux, optimizer.init(aux))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert all(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(aux), strict=True))
    network = qn.quantize(after, lattice)
    assert set(np.unique(network["dense2"]["kernel"][...])) == {-1.0, 0.0, 1.0}
    assert nnx.merge(graph, network)(images).shape == (6, 3)
    assert len(np.unique(network["dense1"]["kernel"][...])) > 1000


def test_a_linen_network_with_partitioning_metadata():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    network = nn.Dense(3, kernel_init=kernel_init)
    variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    lattice = qn.Lattice(rules=(("bias$", None),), projection="tanh")
    aux = qn.init_auxiliary(variables, lattice, key=jax.random.key(1))
    optimizer = qn.stable_mirror_descent(1e-2, lattice, inverse_temperature=SHARP)
    state = optimizer.init(aux)
    grads = jax.grad(lambda v: network.apply(v, jnp.ones((2, 4))).sum())(qn.project(aux, lattice, 1.0))
    updates, state = optimizer.update(grads, state, aux)
    quantized = qn.quantize(optax.apply_updates(aux, updates), lattice)
    assert set(np.unique(nn.unbox(quantized)["params"]["kernel"])) == {-1.0, 1.0}
    assert jax.tree.structure(quantized) == jax.tree.structure(variables)


def test_masked_leaves_need_no_auxiliary_variables():
    lattice = lattice_of("softmax")
    params = problem()[0]
    aux = qn.init_auxiliary(params, lattice, key=jax.random.key(0))
    quantizer = optax.masked(
        qn.proximal_mean_field(0.1, qn.Lattice(), inverse_temperature=2.0), {"kernel": True, "scale": False}
    )
    whole = qn.proximal_mean_field(0.1, lattice, inverse_temperature=2.0)
    grads = {"kernel": jnp.ones((12, 5)), "scale": jnp.ones(5)}
    ours, _ = quantizer.update(grads, quantizer.init(aux), aux)
    expected, _ = whole.update(grads, whole.init(aux), aux)
    np.testing.assert_allclose(ours["kernel"], expected["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(ours["scale"], grads["scale"])


@pytest.mark.parametrize("name", ["pmf double", "md-softmax-s"])
def test_multi_steps_accumulates_gradients_through_the_projection(name):
    projection, make = METHODS[name]
    lattice = lattice_of(projection)
    params, x, y, _ = problem()
    aux = qn.init_auxiliary(params, lattice, key=jax.random.key(0))
    gradient = jax.grad(lambda aux, rows: loss_of(qn.project(aux, lattice, 1.0), x[rows], y[rows]))
    optimizer = optax.MultiSteps(make(lattice), 2)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides a float by an int
        _, state = optimizer.update(gradient(aux, slice(0, 32)), optimizer.init(aux), aux)
        updates, state = optimizer.update(gradient(aux, slice(32, 64)), state, aux)
    once = make(lattice)
    expected, _ = once.update(gradient(aux, slice(0, 64)), once.init(aux), aux)
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    (annealing,) = trees.find_states(state, qn.annealing.AnnealingState)
    assert int(annealing.count) == 1


def test_inject_hyperparams_makes_learning_rate_and_temperature_adjustable():
    lattice = lattice_of("softmax")
    optimizer = optax.inject_hyperparams(qn.proximal_mean_field)(0.1, lattice, inverse_temperature=2.0)
    aux = qn.init_auxiliary(problem()[0], lattice, key=jax.random.key(0))
    state = optimizer.init(aux)
    assert float(qn.read_inverse_temperature(state)) == 2.0
    state.hyperparams["inverse_temperature"] = jnp.float32(8.0)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, aux), state, aux)
    assert float(qn.read_inverse_temperature(state)) == 8.0  # of the next forward pass


def test_binary_connect_keeps_float_weights_within_the_labels():
    aux, _, _ = train("binary-connect", 100)
    assert float(jnp.abs(aux["kernel"]).max()) == 1.0
    free, _, _ = train("straight-through", 100)
    assert 1.0 < float(jnp.abs(free["kernel"]).max()) < 1.5  # its gradient stops outside, Adam's momentum does not


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qn.Lattice(()), "at least two labels, got"),
        (lambda: qn.Lattice((1,)), "at least two labels"),
        (lambda: qn.Lattice((1, 1)), "finite and distinct"),
        (lambda: qn.Lattice((1, float("nan"))), "finite and distinct"),
        (lambda: qn.Lattice(rules=(("bn", ()),)), "at least two labels"),
        (lambda: qn.Lattice(projection="sign"), "projection must be one of"),
        (lambda: qn.labels.symmetric_labels(1), "at least two labels, got 1"),
        (lambda: qn.inverse_temperature_schedule(0.9, 100), "growth must be at least 1, got 0.9"),
        (lambda: qn.inverse_temperature_schedule(1.1, 0), "every must be at least 1"),
        (lambda: qn.inverse_temperature_schedule(1.1, 1, maximum=1e40), "within float32"),
        (
            lambda: qn.proximal_mean_field(0.1, qn.Lattice(), inverse_temperature=-1.0),
            "inverse_temperature must be positive, got -1",
        ),
        (
            lambda: qn.proximal_mean_field(0.1, qn.Lattice(), inverse_temperature=optax.linear_schedule(5.0, 1.0, 100)),
            "never falls, got 5.0 at step 0 and 4.96",
        ),
        (
            lambda: qn.proximal_mean_field(0.1, qn.Lattice(projection="argmax"), inverse_temperature=1.0),
            "needs a lattice with",
        ),
        (
            lambda: qn.proximal_mean_field(0.1, qn.Lattice(), inverse_temperature=1.0, jacobian="full"),
            "jacobian must be one of",
        ),
        (
            lambda: qn.mirror_descent(0.1, qn.Lattice(qn.labels.TERNARY, (), "tanh"), inverse_temperature=1.0),
            "closed for two labels",
        ),
        (lambda: qn.binary_connect(0.1, qn.Lattice()), "needs a lattice with projection='round'"),
        (lambda: qn.projections.softmax_projection(jnp.zeros((1, 3))), "at least two labels in the leading axis"),
        (lambda: qn.projections.softmax_projection(jnp.zeros((2, 3)), jacobian="clipped"), "jacobian must be one of"),
        (
            lambda: qn.read_inverse_temperature(qn.icm(0.1, qn.Lattice(projection="argmax")).init(jnp.zeros((2, 1)))),
            "have none",
        ),
        (
            lambda: qn.init_auxiliary({"w": jnp.ones(2)}, lattice_of("softmax"), key=jax.random.key(0)),
            "rule 0, 'scale'",
        ),
        (lambda: qn.init_auxiliary({"w": jnp.arange(2)}, qn.Lattice(), key=jax.random.key(0)), "only floating-point"),
        (lambda: qn.project({"w": jnp.ones((3, 2))}, qn.Lattice()), r"of 'w' must be \[2 labels, ...\]"),
        (lambda: qn.quantize(jnp.array([jnp.inf, 1.0]), lattice_of("tanh")), "1 of 2 .* not finite, the first is inf"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mistakes_on_update_are_named():
    aux = jnp.zeros((2, 3))
    rule = qn.rules.scale_by_proximal_mean_field(qn.Lattice(), inverse_temperature=1.0)
    with pytest.raises(ValueError, match="needs params"):
        rule.update(jnp.zeros(3), rule.init(aux))
    with pytest.raises(ValueError, match="or of the projected weights"):
        rule.update(jnp.zeros(4), rule.init(aux), aux)
    rule = qn.rules.scale_by_icm(qn.Lattice(qn.labels.TERNARY, projection="argmax"))
    with pytest.raises(ValueError, match="two labels only, got 3"):
        rule.update(jnp.zeros(3), rule.init(jnp.zeros((3, 3))), jnp.zeros((3, 3)))


def test_citations():
    lattice = qn.Lattice(projection="tanh")
    assert "ajanthan2021mirror" in citation(qn.stable_mirror_descent(0.1, lattice, inverse_temperature=1.0))
    assert "courbariaux2015binaryconnect" in citation(qn.binary_connect(0.1, qn.Lattice(projection="round")))
