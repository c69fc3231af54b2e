"""Tools to test nbray and what is built on it, shipped with it."""
