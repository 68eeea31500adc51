"""The renderings of reference pages that are not part of the product: protos.py and errors.py."""
