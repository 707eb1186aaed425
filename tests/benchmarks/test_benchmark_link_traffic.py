"""What the benchmark tells about links: bytes of compiled programs, and times that a formula on paper gives."""

import jax
import pytest

from benchmarks._machinery import staged_decoder
from benchmarks.cases import _link_traffic as link_traffic
from jaxlib_methods import models
from jaxlib_methods.parallel.pipelines import links
from tests.jaxlib_methods.parallel.pipeline_problems import chain

K = 6


@pytest.fixture(autouse=True)
def lenient():
    """As the benchmarks run: AdamW of optax mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def codings():
    return link_traffic.codings(300, 32, K)


def test_a_compiled_pipeline_sends_what_the_formula_says(codings, monkeypatch):
    config = models.GPTConfig(11, 3)
    monkeypatch.setattr(staged_decoder, "decoder", lambda config, subspace: chain(layers=2))
    compiled, _ = link_traffic.coded_pipeline(config, codings["bf16"], 2, 3, 2)
    forward, backward = link_traffic.message_bytes(codings["bf16"], (2, 3), 8)
    assert link_traffic.boundary_bytes(compiled, 3) == ({forward}, {backward})
    assert (forward, backward) == (2 * 3 * 8 * 2, 2 * 3 * 8 * 2)


def test_bytes_a_token(codings):
    found = {name: link_traffic.message_bytes(coding, (2, 8), 32) for name, coding in codings.items()}
    a_token = {"dense": (128, 128), "bf16": (64, 64), "int8": (36, 36), "top_k": (5 * K, 5 * K)}
    a_token |= {"subspace": (4 * K + 2, 4 * K), "subspace bf16": (2 * K + 2, 2 * K)}
    assert found == {name: (16 * forward, 16 * backward) for name, (forward, backward) in a_token.items()}


def test_messages_of_the_paper_are_a_hundred_times_smaller():
    messages = link_traffic.messages_of(link_traffic.PROTOCOL_MODELS)
    assert messages == {"dense": (1024 * 8192, 1024 * 8192), "subspace": (1024 * 82, 1024 * 80)}


def test_a_late_average_hides_behind_the_update_until_its_link_is_full():
    setting = link_traffic.ASYNC_MESH
    costs = links.StageCosts(3 * [1.0] + [0.0], 4 * [2.0], 0, 0)
    seconds = lambda size, link, **options: link_traffic.update_seconds(
        setting, link_traffic.Shapes(costs, {"dense": (0, 0)}, {"all": size}), link, averaged="all", **options
    )
    link = links.Link(8e6)  # a second for a megabyte: two replicas exchange half of it twice
    assert seconds(1e6, link) == pytest.approx(4.0)
    assert seconds(1e6, link, tau=10) == pytest.approx(3.0)
    assert seconds(9e6, link, tau=10) == pytest.approx(9.0)
    assert seconds(1e6, link._replace(latency=20.0), tau=1) == pytest.approx(41.0)  # the pipeline alone: 32.75


def test_shapes_of_a_setting_need_no_arrays():
    setting = link_traffic.ASYNC_MESH
    small = setting._replace(config=models.GPTConfig(100, 16, 4, 32, 2, dtype="bfloat16"), examples=2)
    shapes = link_traffic.shapes_of(small, 1e9)
    d, tokens = 32, 32
    products = 24 * d * d * tokens + 4 * 2 * 16 * 16 * d  # the block's matrices, and attention's two products
    assert shapes.costs.forward[0] * 1e9 == pytest.approx(products, rel=0.1)
    assert shapes.costs.forward[-1] == 0 and shapes.costs.backward[-1] > shapes.costs.backward[0]
    embedding, block = (100 + 16) * d, 12 * d * d + 4 * d + 6 * d  # two norms, biases of out, up and down
    assert shapes.reduced["all"] == 4 * (embedding + block)
    assert shapes.reduced["5 %"] == pytest.approx(0.05 * shapes.reduced["all"], rel=0.02)
