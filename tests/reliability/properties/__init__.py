"""Randomly drawn problems and the properties that hold of each, for every backend: tests and the soak share them."""
