"""Stores of items, behind one contract."""
