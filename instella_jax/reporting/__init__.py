"""What a run tells: metrics, progress, images."""
