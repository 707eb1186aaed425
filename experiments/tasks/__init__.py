"""What is learned or solved: `load(options) -> Task`, a frozen dataclass of functions that knows no method."""
