"""(IA)^3 and SSF for inlay."""
