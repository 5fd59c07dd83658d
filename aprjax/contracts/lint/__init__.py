"""`lint`: are contracts valid, and can their bound tests break them? Upstream's do not check that (contracts.md 7)."""
