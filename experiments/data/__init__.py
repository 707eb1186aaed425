"""Data as numpy arrays: embedded ones, prepared TFDS sets, and the users' own files."""
