"""Predict the costs of all parallel strategies for a network, and choose one."""
