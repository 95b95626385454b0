"""What is scored: a system on a dataset."""
