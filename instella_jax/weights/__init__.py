"""Model folders, and published checkpoints in and out."""
