"""Engines: the seam between the API and a cluster."""
