"""The product around inlay's core."""
