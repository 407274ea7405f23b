"""What a config needs and costs, without accelerators."""
