"""Expected free energy of discrete policies in a partially observed world, in plain PyTorch."""
