"""Guesses of the tokens to come, which a step checks along with the token that it computes anyway."""
