"""What makes data sets for training."""
