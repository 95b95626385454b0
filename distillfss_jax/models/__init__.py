"""Few-shot segmenters and the students that imitate them."""
