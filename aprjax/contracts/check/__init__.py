"""`check`: the rules of the contracts, run on two sides. Imported by the command that needs it: it imports jax."""
