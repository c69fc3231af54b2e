"""Scheduling: pure machines that decide what runs when and where."""
