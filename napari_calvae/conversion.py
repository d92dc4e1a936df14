"""Results as values of other packages (being built)."""
