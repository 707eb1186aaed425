"""Programs on the library that reproduce its papers: methods -> tasks -> data -> _machinery, and no arrow back."""
