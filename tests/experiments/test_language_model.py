"""Texts and windows, and the common language-model task: same batches after a resume, same start for all optimizers."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._machinery.errors import DataError
from experiments.data import text
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models

TINY = {"layers": 1, "width": 16, "heads": 2, "block": 16, "batch_size": 7, "validation_windows": 14}
TINY |= {"steps": 6, "evaluate_every": 3}


class TestTexts:
    def test_the_default_needs_nothing_and_shares_no_paragraph(self):
        loaded = text.load("python_docs")
        assert loaded.vocab_size == 256 and loaded.train.dtype == np.uint8 and len(loaded.train) > 200_000
        assert abs(len(loaded.validation) / len(loaded.train) - 1 / 9) < 1e-3
        parts = [set(loaded.decode(part).split("\n\n")) for part in (loaded.train, loaded.validation)]
        assert not parts[0] & parts[1] and "assert" in parts[0].pop() + loaded.decode(loaded.train[:500])
        np.testing.assert_array_equal(loaded.train, text.load("python_docs").train)

    def test_a_file_is_cut_at_its_end(self, tmp_path):
        path = tmp_path / "mine.txt"
        path.write_text("naïve café " * 10, encoding="utf-8")
        for tokenizer, size, total in (("byte", 256, 130), ("character", 9, 110)):
            loaded = text.load(str(path), tokenizer=tokenizer, validation_fraction=0.2)
            assert loaded.vocab_size == size and len(loaded.train) + len(loaded.validation) == total
            assert len(loaded.validation) == total // 5
            together = np.concatenate([loaded.train, loaded.validation])
            assert loaded.decode(together) == "naïve café " * 10 and together.max() < size

    def test_another_file_is_wholly_for_validation(self, tmp_path):
        for name, content in (("a", "abcd"), ("b", "cdef")):
            (tmp_path / f"{name}.txt").write_text(content)
        loaded = text.load(str(tmp_path / "a.txt"), validation=str(tmp_path / "b.txt"), tokenizer="character")
        assert (loaded.decode(loaded.train), loaded.decode(loaded.validation)) == ("abcd", "cdef")
        assert loaded.vocab_size == 6  # of both parts

    def test_ids_of_another_tokenizer(self, tmp_path):
        path = tmp_path / "ids.npy"
        np.save(path, np.arange(50_257)[::-1])
        loaded = text.load(str(path))
        assert loaded.train.dtype == np.uint16 and loaded.vocab_size == 50_257
        assert loaded.train[0] == 50_256 and loaded.validation[-1] == 0

    def test_tfds_splits_and_text_files_of_the_shared_folder(self, shared_data):
        loaded = text.load("tiny_shakespeare", data_dir=shared_data / "tfds", tokenizer="character")
        assert loaded.vocab_size == 65 and loaded.decode(loaded.train[:13]) == "First Citizen"
        assert (len(loaded.train), len(loaded.validation)) == (1_003_854, 55_770)
        train, held_out = (str(shared_data / "text" / f"wikitext2_{part}.txt") for part in ("valid", "test"))
        loaded = text.load(train, validation=held_out)
        assert len(loaded.train) == 1_121_681 and len(loaded.validation) == 1_256_449

    def test_sets_from_hugging_face_have_the_name_that_tfds_gives_them(self, shared_data, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        prepared = tmp_path / "salesforce__wikitext" / "wikitext_103_raw_v1" / "1.0.0"
        shutil.copytree(shared_data / "tfds" / "tiny_shakespeare" / "1.0.0", prepared)
        loaded = text.load("huggingface:salesforce__wikitext/wikitext-103-raw-v1", data_dir=tmp_path)
        assert loaded.decode(loaded.train[:13]) == "First Citizen"

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("no/such.txt", {}, r"no/such\.txt cannot be read as UTF-8 text"),
            ("no/such.npy", {}, r"no/such\.npy cannot be read as \.npy"),
            ("digits", {}, "data set 'digits' has no texts; texts are python_docs"),
            ("tiny_shakespear", {}, "unknown data set 'tiny_shakespear'.*texts are python_docs"),
            ("python_docs", {"tokenizer": "word"}, "tokenizer must be one of byte, character, got 'word'"),
            ("python_docs", {"validation": "python_docs"}, "'python_docs' is the training text"),
            ("python_docs", {"validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\), got 1.0"),
        ],
    )
    def test_what_cannot_be_loaded_is_one_sentence(self, name, options, message, tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            text.load(name, data_dir=tmp_path, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 2), int), "one axis of integers"),
            (np.array([-1]), "from 0 on"),
            (np.zeros(0, int), "is empty"),
        ],
    )
    def test_ids_of_the_wrong_kind(self, array, message, tmp_path):
        np.save(tmp_path / "ids.npy", array)
        with pytest.raises(DataError, match=message):
            text.load(str(tmp_path / "ids.npy"))

    def test_a_python_without_its_topics_says_what_to_name(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(DataError, match=r"without pydoc_data .*--text"):
            text.load("python_docs")


class TestWindows:
    def test_every_start_is_drawn_equally_often_and_every_window_is_contiguous(self, key):
        block = 8
        rows = text.training_rows(np.arange(96, dtype=np.uint8), block)
        assert rows.shape == (11, 16)
        draw = jax.jit(lambda key: text.random_window(jnp.asarray(rows), key, block=block))
        windows = np.concatenate([draw(k) for k in jax.random.split(key, 400)])
        assert windows.shape[1] == block + 1 and windows.dtype == np.uint8
        np.testing.assert_array_equal(np.diff(windows.astype(int), axis=1), 1)
        counts = np.bincount(windows[:, 0], minlength=88)
        assert len(counts) == 88 and counts.min() > 20 and counts.max() < 90  # 50 each in expectation

    def test_windows_are_a_function_of_the_key(self, key):
        rows = jnp.asarray(text.training_rows(np.arange(96, dtype=np.uint8), 8))
        first, second, other = (text.random_window(rows, k, block=8) for k in (key, key, jax.random.key(1)))
        np.testing.assert_array_equal(first, second)
        assert (first != other).any()

    def test_validation_windows_are_fixed_spread_and_share_no_target(self):
        tokens = np.arange(101, dtype=np.uint8)
        rows = text.validation_rows(tokens, 10)
        np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 101))
        np.testing.assert_array_equal(text.validation_rows(tokens, 10, 3)[:, 0], [0, 40, 90])

    @pytest.mark.parametrize("length", [0, 5, 8])
    def test_a_text_shorter_than_a_block_is_refused(self, length):
        for rows in (text.training_rows, text.validation_rows):
            with pytest.raises(DataError, match=f"{length} tokens, too few for a block of 8 .* smaller block"):
                rows(np.zeros(length, np.uint8), 8)

    def test_a_text_of_one_block_and_a_little_has_one_row(self, key):
        rows = text.training_rows(np.arange(11, dtype=np.uint8), 8)
        assert rows.shape == (1, 11)
        starts = {int(text.random_window(jnp.asarray(rows), k, block=8)[0, 0]) for k in jax.random.split(key, 50)}
        assert starts == {0, 1, 2}


@pytest.fixture(scope="module")
def task():
    return language_model.load(language_model.Options(**TINY))


class TestTask:
    def test_options_change_the_preset_in_proportion(self):
        config = language_model.Options(preset="llama_small", width=96, heads=6, layers=2, block=32).model(99)
        expected = dataclasses.replace(
            models.GPT_CONFIGS["llama_small"],
            vocab_size=99, block_size=32, layers=2, width=96, heads=6, kv_heads=2, mlp_width=256,
        )  # fmt: skip
        assert config == expected
        assert language_model.Options(preset="gpt2_small").model() == models.GPT_CONFIGS["gpt2_small"]

    def test_loss_is_the_mean_negative_log_likelihood(self, task):
        params = task.init(jax.random.key(0))
        windows = jnp.asarray(task.calibration(3))
        loss, (model_state, _) = jax.jit(task.loss_fn)(params, (), windows, jax.random.key(0))
        logits = np.asarray(jax.jit(task.apply)(params, windows[:, :-1]), np.float64)
        chosen = np.take_along_axis(logits, np.asarray(windows)[:, 1:, None].astype(int), -1)[..., 0]
        np.testing.assert_allclose(loss, (np.log(np.exp(logits).sum(-1)) - chosen).mean(), rtol=1e-5)
        assert model_state == ()
        half = language_model.cross_entropy(jnp.asarray(logits, jnp.bfloat16), windows[:, 1:])
        assert half.dtype == jnp.float32

    def test_evaluation_is_the_mean_over_the_validation_windows(self, task):
        state = task.start(optax.sgd(0.1), 0)
        windows = jnp.asarray(text.validation_rows(task.text.validation, 16, 14))
        expected = jax.jit(task.loss_fn)(state.params, (), windows, jax.random.key(0))[0]
        np.testing.assert_allclose(task.evaluate(state)["validation_loss"], expected, rtol=1e-5)

    def test_the_start_depends_on_the_seed_and_not_on_the_optimizer(self, task):
        one, two = task.start(optax.sgd(0.1), 3), task.start(optax.sgd(0.2, momentum=0.9), 3)
        jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
        assert (jax.random.key_data(one.key) == jax.random.key_data(two.key)).all()
        other = task.start(optax.sgd(0.1), 4)
        assert (one.params["head"]["logits"]["kernel"][...] != other.params["head"]["logits"]["kernel"][...]).any()

    def test_training_lowers_the_loss_and_a_resumed_run_ends_with_the_same_bits(self, task, tmp_path):
        optimizer = optax.sgd(0.3)
        whole, history = task.fit(optimizer, 0, tmp_path / "whole", label="whole")
        task.fit(optimizer, 0, tmp_path / "cut", label="cut", steps=3)
        resumed, _ = task.fit(optimizer, 0, tmp_path / "cut", label="cut")
        jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
        evaluated = language_model.evaluations(history)
        assert [record["step"] for record in evaluated] == [3, 6]
        assert evaluated[1]["validation_loss"] < task.evaluate(task.start(optimizer, 0))["validation_loss"] - 0.05
        lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["validation_loss"] == evaluated[1]["validation_loss"]

    def test_calibration_windows_come_from_the_training_text(self, task):
        train = task.text.train.tobytes()
        windows = task.calibration(5, seed=1)
        assert windows.shape == (5, 17) and all(window.tobytes() in train for window in windows)
        np.testing.assert_array_equal(windows, task.calibration(5, seed=1))

    def test_half_precision_keeps_float32_parameters(self):
        task = language_model.load(language_model.Options(**TINY | {"dtype": "bfloat16"}))
        with jax.numpy_dtype_promotion("standard"):  # flax's norms promote to float32 on their own
            state, _ = task.fit(optax.sgd(0.1), 0, None, label="half", steps=2)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_schedule_warms_up_and_ends_at_a_tenth():
    schedule = language_model.warmup_cosine(1.0, 100)
    np.testing.assert_allclose(
        [schedule(0), schedule(6), schedule(53), schedule(100)], [1 / 6, 1, 0.55, 0.1], atol=1e-6
    )
    assert language_model.warmup_cosine(1.0, 2)(0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "gpt5"}, "preset must be one of gpt_tiny, llama_tiny"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"width": 30}, "heads must divide width, got 4 heads and width 30"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        language_model.Options(**options)


def test_a_file_with_any_ending_is_a_text(tmp_path):
    (tmp_path / "notes.md").write_text("to be or not to be " * 20)
    found = text.load(str(tmp_path / "notes.md"))
    assert found.decode(found.train[:5]) == "to be" and len(found.validation) == 38
