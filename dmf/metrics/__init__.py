"""How good samples are: arrays in, numbers out. Nothing here reads a file."""
