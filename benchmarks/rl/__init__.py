"""Deep Q-learning on gymnasium's environments, as a program for the engine."""
