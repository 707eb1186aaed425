"""Every example in every docstring of the library is run, public or private, kernels included."""

import doctest
import importlib
import inspect

import pytest

from tests.library_modules import module_names

pytestmark = pytest.mark.contract


class Finder(doctest.DocTestFinder):
    """Finds functions behind decorators too: the standard finder drops them, and the tests' type checker is one."""

    def _from_module(self, module, object):
        return getattr(object, "__module__", module.__name__) == module.__name__


@pytest.mark.parametrize("name", [name for name, _ in module_names()])
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    examples = 0
    for test in Finder().find(module, name):
        examples += len(test.examples)
        runner.run(test, out=report.append)
    assert not report, "\n".join(report)
    written = sum(line.lstrip().startswith(">>> ") for line in inspect.getsource(module).splitlines())
    # More are reached where a jitted alias shows the examples of its function again.
    assert examples >= written, f"{name} shows {written} examples and only {examples} are reached from its objects"
