"""Modules that only this package uses: nothing here is public."""
