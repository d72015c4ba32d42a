"""Shared by all tests of the kit. ``pytester`` runs pytest on small projects of its own."""

pytest_plugins = ["pytester"]
