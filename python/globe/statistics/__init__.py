"""What the experts are given: texts, moments, and the metric that follows."""
