"""Loss terms that a trainer adds to its method's loss."""
