"""Our losses and gradients beside those of the official releases."""
