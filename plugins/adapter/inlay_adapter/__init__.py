"""Bottleneck adapters for inlay: serial (Houlsby, Pfeiffer) and parallel."""
