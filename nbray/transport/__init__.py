"""Framed messages over Unix sockets."""
