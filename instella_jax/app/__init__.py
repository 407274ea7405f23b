"""The web demo and the HTTP API: one process that holds the weights, many who ask for pictures."""
