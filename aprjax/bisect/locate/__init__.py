"""`bisect locate`: which places cause a drift, found and proven by putting values in."""
