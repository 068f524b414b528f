"""BitFit and LN tuning for inlay."""
