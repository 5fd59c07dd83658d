"""The questions: one module each, pure functions that return reports; rendering lives apart."""
