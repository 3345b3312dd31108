"""The metric module gfid."""
