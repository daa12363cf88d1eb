"""The papers' figures and control experiments, one a module."""
