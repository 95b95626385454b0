"""Pure functions on arrays: resizing, attention, losses and scores."""
