"""Helpers of the package's own modules; nothing here is public."""
