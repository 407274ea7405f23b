"""How good a model is: reconstruction, composition, distributions."""
