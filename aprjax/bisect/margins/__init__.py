"""`bisect margins`: top-1/top-2 margins of two sides at every position, judged by measured noise."""
