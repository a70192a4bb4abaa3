"""Measured results, and the commands that make and render them. Not part of the installed package."""
