"""What is trained: data, a network, a loss, measures, and how long it takes."""
