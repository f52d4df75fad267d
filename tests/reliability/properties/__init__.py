"""Random problems and the properties that hold for each, on every backend; the tests and the soak share them."""
