"""How good samples are: Frechet distance, precision and recall, and the declared score of digits and photos."""
