"""Requests, schedule, steps and text. Imports no torch."""
