"""What may be opened, with which keys, and how an address is written down."""
