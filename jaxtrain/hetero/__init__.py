"""Replicas of unequal speed that join and leave: their group, shares by speed, and the exchange of gradients."""
