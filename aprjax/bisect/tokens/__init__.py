"""`bisect tokens`: what both sides are fed, and whether it is what the prompt meant."""
