"""A griffe extension: this library's docstrings as mkdocstrings reads them."""

import griffe

from docs import generate


class LibraryDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = generate.rewrite(obj.docstring.value)

    def on_attribute_instance(self, *, attr, **kwargs):
        """The comment on a field's line, with its shape and dtype, is its documentation."""
        if not attr.docstring and attr.parent.is_class and attr.lineno:
            _, _, comment = attr.source.partition("  # ")
            if comment:
                attr.docstring = griffe.Docstring(comment.strip(), lineno=attr.lineno, parent=attr)
