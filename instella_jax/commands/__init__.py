"""What each terminal command does."""
