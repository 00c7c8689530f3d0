"""The mathematics of PACT: pure functions on numbers, arrays and tensors. Imports nothing of this project."""
