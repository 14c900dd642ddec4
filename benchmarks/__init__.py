"""Measurements: how fast the package is, and what is forgotten. Run by hand; see README.md."""
