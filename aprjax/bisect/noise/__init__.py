"""How far legitimate changes of a computation move its values: the basis of every threshold, and `bisect noise`."""
