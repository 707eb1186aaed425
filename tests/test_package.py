import jaxlib_methods


def test_has_a_version():
    assert jaxlib_methods.__version__.count(".") == 2
