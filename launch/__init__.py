"""What starts many runs, and what gathers them."""
