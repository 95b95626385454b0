"""A run's folder: checkpoints, lock, signals, logs, pictures, results."""
