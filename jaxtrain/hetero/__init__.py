"""Replicas of unequal speed that come and go: their group, shares by speed, and the exchange of gradients."""
