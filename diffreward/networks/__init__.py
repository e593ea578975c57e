"""Networks that policies and rewards share; each is imported from its own module."""
