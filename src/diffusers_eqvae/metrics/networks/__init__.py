"""Feature networks: one file each, and named by their files."""
