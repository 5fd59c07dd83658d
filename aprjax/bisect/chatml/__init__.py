"""Why does a ChatML prompt go bad? The factorial over sides, wraps, stop tokens and arithmetics."""
