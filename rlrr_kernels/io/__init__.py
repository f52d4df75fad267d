"""Reads and writes files: nothing a file says is believed before it is checked, and no file is left half-written."""
