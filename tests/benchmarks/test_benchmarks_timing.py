import dataclasses
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._machinery import ceilings, records
from benchmarks.timing import Case, Implementation, Options, Skip, measure, peer

KEYS = {
    *("benchmark", "case", "implementation", "lower_ms", "compile_ms", "samples_ms", "median_ms", "peak_bytes"),
    *("flops", "bytes", "fraction_of_ceiling", "error", "ratios", "versions", "device", "date"),
}


class FakeMachine:
    """A clock that only the called implementations move, and the list of calls."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def implementation(self, name, seconds):
        def function():
            self.calls.append(name)
            self.now += seconds
            return np.float32(1)

        return Implementation(function)

    def case(self, durations, **options):
        implementations = {name: self.implementation(name, s) for name, s in durations.items()}
        return Case("b", "c", implementations, **options)

    def clock(self):
        return self.now


@pytest.fixture
def slow_ceilings(monkeypatch):
    """Ceilings of 1 byte/s and 2 operations/s: no time is spent on measuring the real ones."""
    monkeypatch.setattr(ceilings, "copy_bytes_per_s", lambda device: 1.0)
    monkeypatch.setattr(ceilings, "matmul_flops_per_s", lambda device, dtype: 2.0)


def test_record_has_exactly_the_documented_keys():
    assert set(records.KEYS) == KEYS


def test_record_of_a_jitted_function(slow_ceilings):
    x = jnp.arange(1000, dtype=jnp.float32)
    case = Case(
        "squares",
        "n=1000",
        {"jax": Implementation(jax.jit(jnp.square), (x,)), "numpy": Implementation(np.square, (np.asarray(x),))},
        reference="numpy",
        bytes=8000,
        flops=1000,
    )
    ours, numpy = measure(case, Options(quick=True))
    assert ours.lower_ms > 0 and ours.compile_ms > 0
    assert numpy.lower_ms is None and numpy.compile_ms is None and numpy.peak_bytes is None
    assert ours.peak_bytes == 8000  # argument and result
    assert ours.median_ms == np.median(ours.samples_ms) > 0
    assert ours.error == numpy.error == 0
    # 8000 bytes at 1 byte/s bind harder than 1000 operations at 2 per second.
    assert ours.device["ceiling"] == "copy"
    assert ours.fraction_of_ceiling == pytest.approx(8000e3 / ours.median_ms)
    assert {"python", "jax", "jaxlib", "numpy", "jaxlib_methods"} <= ours.versions.keys()
    assert ours.device["platform"] == jax.devices()[0].platform
    assert json.loads(json.dumps(dataclasses.asdict(ours), allow_nan=False)).keys() == KEYS


def test_samples_are_interleaved_and_the_first_place_rotates():
    machine = FakeMachine()
    records = measure(
        machine.case({"a": 1, "b": 1, "c": 1}, seconds=0, min_rounds=4, warm_up=2), Options(), clock=machine.clock
    )
    warm, timed = machine.calls[:6], machine.calls[6:]
    assert warm == ["a", "a", "b", "b", "c", "c"]
    assert timed == ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [len(r.samples_ms) for r in records] == [4, 4, 4]


def test_ratio_above_one_means_that_the_record_is_faster_than_the_other():
    machine = FakeMachine()
    ours, slow, fast = measure(
        machine.case({"ours": 2, "slow": 6, "fast": 1}), Options(quick=True), clock=machine.clock
    )
    assert ours.median_ms == 2000
    assert ours.ratios == {"slow": 3.0, "fast": 0.5}
    assert slow.ratios["ours"] == pytest.approx(1 / 3)
    assert fast.ratios["ours"] == 2.0


@pytest.mark.parametrize(("quick", "rounds"), [(False, 25), (True, 5)])
def test_number_of_rounds_fills_the_time_aimed_at(quick, rounds):
    machine = FakeMachine()
    (record,) = measure(machine.case({"a": 0.25}, seconds=6.25), Options(quick=quick), clock=machine.clock)
    assert len(record.samples_ms) == rounds


def test_donated_arguments_are_fresh_in_every_call():
    x = jnp.arange(4, dtype=jnp.float32)
    donating = jax.jit(lambda x, y: x + y, donate_argnums=0)
    implementations = {"ours": Implementation(donating, (x, x + 1)), "kept": Implementation(jnp.add, (x, x + 1))}
    records = measure(Case("b", "c", implementations, reference="kept", seconds=0), Options())
    assert records[0].error == 0
    np.testing.assert_array_equal(x, [0, 1, 2, 3])  # the caller's array has not been given away


def test_arguments_made_before_every_call_are_outside_the_clock():
    machine = FakeMachine()
    made = []

    def make():
        machine.now += 100
        made.append(object())
        return (made[-1],)

    def function(argument):
        assert argument is made[-1]
        machine.now += 1
        return np.float32(0)

    (record,) = measure(
        Case("b", "c", {"a": Implementation(function, make)}, seconds=0), Options(), clock=machine.clock
    )
    assert set(record.samples_ms) == {1000.0}
    assert len(made) == len(record.samples_ms) + 2


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, 1e-3], [0.0, 0.0], 1e-3),
        ([np.inf, np.nan, 1.0], [np.inf, np.nan, 1.0], 0.0),
        ({"a": np.array([True, False]), "b": np.int32(3)}, {"a": np.array([True, True]), "b": np.int32(3)}, 1.0),
        (np.float32(1) + np.float32(2**-23), 1.0, 2**-23),  # not lost to the precision of the results
    ],
)
def test_error_is_relative_to_the_reference_scale(output, reference, expected):
    assert records.error(output, reference) == expected


@pytest.mark.parametrize(("output", "reference"), [([np.inf], [1.0]), ([1.0], [np.nan]), (np.zeros(2), np.zeros(3))])
def test_error_that_is_no_number_is_refused(output, reference):
    with pytest.raises(ValueError, match=r"not finite|shapes"):
        records.error(output, reference)


def test_canonical_form_is_what_the_error_compares():
    implementations = {
        "reference": Implementation(lambda: np.float32(2)),
        "ours": Implementation(lambda: {"sum": np.float32(1), "count": 2}, canonical=lambda o: o["sum"] * o["count"]),
    }
    records = measure(Case("b", "c", implementations, reference="reference", seconds=0), Options())
    assert records[1].error == 0


def test_absent_peer_is_skipped_with_a_note(capsys):
    options = Options()
    skip = peer("no_such_module_at_all", lambda module: pytest.fail("made"), extra="peers")
    assert isinstance(skip, Skip)
    records = measure(Case("b", "c", {"ours": Implementation(lambda: 1), "theirs": skip}, seconds=0), options)
    assert [r.implementation for r in records] == ["ours"]
    assert records[0].ratios == {}
    assert len(options.notes) == 1
    assert "theirs skipped" in options.notes[0] and "no_such_module_at_all" in options.notes[0]
    assert options.notes[0] in capsys.readouterr().err


def test_peer_that_is_there_is_measured_with_its_version():
    scipy = peer("scipy.special", lambda special: Implementation(special.expit, (0.0,)))
    ours = Implementation(lambda: 0.5)
    for record in measure(Case("b", "c", {"ours": ours, "scipy": scipy}, reference="ours", seconds=0), Options()):
        assert record.error == 0
        assert record.versions["scipy"] == importlib.metadata.version("scipy")


def test_reference_must_run_here():
    with pytest.raises(ValueError, match="reference must name an implementation that runs here, got 'theirs'"):
        Case("b", "c", {"ours": Implementation(lambda: 1), "theirs": Skip("absent")}, reference="theirs")


def test_ceilings_are_the_best_rate_so_far(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 4 * 2**20})
    monkeypatch.setattr(ceilings, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_shortest_s", {})
    device = jax.devices("cpu")[-1]
    for measured, work in ((ceilings.copy_bytes_per_s, 8 * 2**20), (ceilings.matmul_flops_per_s, 2 * 64**3)):
        first = measured(device)
        assert first > 0
        assert measured(device) >= first
        (what,) = ceilings._shortest_s
        ceilings._shortest_s[what] = 1e-12  # faster than any machine
        assert measured(device) == pytest.approx(work * 1e12)
        ceilings._shortest_s.clear()
