"""The renderings of the reference pages, one module each."""
