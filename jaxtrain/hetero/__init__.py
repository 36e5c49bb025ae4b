"""Replicas of unequal speed that come and go: the group, shares by speed, and the exchange of gradients by the hosts."""
