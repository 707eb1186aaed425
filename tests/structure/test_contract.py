"""Every file of the library's tests has a part in the contract that the oldest JAX keeps."""

import pathlib

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path for folder in ("jaxlib_methods", "kernels") for path in (TESTS / folder).rglob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_one_exact_check_is_marked(path):
    assert "pytest.mark.contract" in path.read_text(), "mark one exact, quick test of it with @pytest.mark.contract"
