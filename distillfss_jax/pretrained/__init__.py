"""Weights of elsewhere: their files, their names, into our parameters."""
