"""Terms of the loss beside an algorithm's."""
