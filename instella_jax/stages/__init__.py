"""What is trained: each stage joins networks, losses and data for the one loop."""
