"""Many small tasks, on which optimizers meet at their defaults."""
