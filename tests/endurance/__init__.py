"""Promises about hostile and broken input, each counted: `python -m tests.endurance` prints "k of n" for every row.

A row is a function that tries n cases and says which held. The suite runs each in its short form.
"""
