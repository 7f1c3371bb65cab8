"""How an accelerated pipeline is executed."""
