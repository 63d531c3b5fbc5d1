"""How variants are made, offline. The only package that may import torch; it runs in an environment of its own."""
