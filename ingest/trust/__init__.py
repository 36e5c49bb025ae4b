"""Trust: the addresses that may be opened, the keys for them, and logs without secrets."""
